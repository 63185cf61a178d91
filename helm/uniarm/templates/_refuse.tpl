{{/* Values that are well-formed each by itself and cannot work together. The schema refuses the others. */}}
{{- define "uniarm.refuse" -}}
{{- if and .Values.etcd.enabled .Values.store.endpoints -}}
{{- fail "store.endpoints names an etcd of your own, and etcd.enabled would start another one: set etcd.enabled to false, or leave store.endpoints empty." -}}
{{- end -}}
{{- if not (or .Values.etcd.enabled .Values.store.endpoints) -}}
{{- fail "The processes need an etcd to find each other: name one in store.endpoints, or set etcd.enabled to true." -}}
{{- end -}}
{{- if and .Values.etcd.enabled (or .Values.store.tlsSecret .Values.store.user) -}}
{{- fail "store.tlsSecret and store.user are for an etcd of your own, and etcd.enabled starts one that knows neither: set etcd.enabled to false and name yours in store.endpoints." -}}
{{- end -}}
{{- if and .Values.store.user (not .Values.store.passwordSecret.name) -}}
{{- fail (printf "store.user is %s, and store.passwordSecret.name is empty: name the secret that holds its password." .Values.store.user) -}}
{{- end -}}
{{- if and .Values.etcd.enabled (gt (int .Values.etcd.replicas) 1) (not .Values.etcd.storage) -}}
{{- fail (printf "etcd.replicas is %d and etcd.storage is empty: a member that loses its data cannot rejoin the others. Give etcd.storage a size, such as 1Gi, or set etcd.replicas to 1." (int .Values.etcd.replicas)) -}}
{{- end -}}
{{- range list "base" "reward" -}}
{{- $model := (index $.Values .).model -}}
{{- if not (regexMatch "^(/models/.+|hf://[^/@\\s]+/[^/@\\s]+(@[^/@\\s]+)?)$" $model) -}}
{{- fail (printf "%s.model is %s, which is neither a path under /models nor of the form hf://organisation/name. Is hf://%s meant?" . $model (trimPrefix "/" $model)) -}}
{{- end -}}
{{- if and (hasPrefix "/models/" $model) (not $.Values.modelVolume) -}}
{{- fail (printf "%s.model is %s, but modelVolume is empty and so nothing is mounted at /models: set modelVolume, for instance to persistentVolumeClaim: {claimName: models}, or give the model as hf://organisation/name." . $model) -}}
{{- end -}}
{{- end -}}
{{- if not .Values.modelVolume -}}
{{- with .Values.reward.adapters -}}
{{- fail (printf "reward.adapters lists %s, but modelVolume is empty and so nothing is mounted at /models: set modelVolume to the volume that holds the adapters." (first .)) -}}
{{- end -}}
{{- end -}}
{{- $names := dict -}}
{{- range .Values.reward.prompted -}}
{{- if hasKey $names .name -}}
{{- fail (printf "reward.prompted names %s twice: a preference could not tell the two apart." .name) -}}
{{- end -}}
{{- $_ := set $names .name true -}}
{{- end -}}
{{- with .Values.router -}}
{{- if and .http.enabled (eq (int .service.port) (int .http.port)) -}}
{{- fail (printf "router.service.port and router.http.port are both %d: gRPC and HTTP need a port each." (int .http.port)) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.router.front.clientCaSecret.name (not .Values.router.front.tlsSecret) -}}
{{- fail "router.front.clientCaSecret asks clients for certificates, and router.front.tlsSecret is empty: without TLS nobody can show one." -}}
{{- end -}}
{{- if and .Values.tls.issuerRef.name (or .Values.tls.secret (not .Values.tls.enabled)) -}}
{{- fail "tls.issuerRef lets cert-manager make a secret for each role: set tls.enabled to true, and leave tls.secret empty." -}}
{{- end -}}
{{- if and .Values.tls.admin (not .Values.tls.enabled) -}}
{{- fail "tls.admin lets the admin ports speak HTTPS with the certificates of tls, and tls.enabled is false: set tls.enabled to true, or tls.admin to false." -}}
{{- end -}}
{{- if and .Values.router.front.tenants.name .Values.batch.enabled (not .Values.client.apiKeySecret.name) -}}
{{- fail "batch.enabled starts a Job that has no API key, and router.front.tenants asks for one: name its secret in client.apiKeySecret." -}}
{{- end -}}
{{- include "uniarm.refuseScaling" . -}}
{{- include "uniarm.refuseGateway" . -}}
{{- range list "batch" "train" -}}
{{- $job := index $.Values . -}}
{{- if and $job.enabled (not $job.volume) -}}
{{- fail (printf "%s.enabled is true, and %s.volume is empty: its files would have no place at /data. Set it, for instance to persistentVolumeClaim: {claimName: data}." . .) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "uniarm.refuseScaling" -}}
{{- range $role := list "base" "reward" -}}
{{- $shards := int (index $.Values $role).shards -}}
{{- $stages := int (index $.Values $role).stages -}}
{{- if ne (mod $shards $stages) 0 -}}
{{- fail (printf "%s.stages is %d, and %s.shards is %d: every stage has as many pods, so set %s.shards to a multiple of %d." $role $stages $role $shards $role $stages) -}}
{{- end -}}
{{- if and (include "uniarm.isScaled" (dict "root" $ "role" $role)) (gt $shards 1) -}}
{{- fail (printf "%s.shards is %d, so that a worker is a StatefulSet of %d pods, and an autoscaler would add pods to one of them: set autoscaling.%s.enabled to false and scale by %s.replicas, or set %s.shards to 1." $role $shards $shards $role $role $role) -}}
{{- end -}}
{{- end -}}
{{- if .Values.autoscaling.by -}}
{{- $grace := add .Values.drainTimeoutSeconds 10 -}}
{{- if gt (int $grace) 1800 -}}
{{- fail (printf "drainTimeoutSeconds is %d: a pool shrinks by one pod in the time that a pod has to leave, and Kubernetes knows no period above 1800 s. Set drainTimeoutSeconds to 1790 or less, or leave autoscaling.by empty." (int .Values.drainTimeoutSeconds)) -}}
{{- end -}}
{{- if and (eq .Values.autoscaling.by "keda") (not .Values.autoscaling.prometheus.address) -}}
{{- fail "autoscaling.by is keda, and KEDA would not know whom to ask: set autoscaling.prometheus.address, for instance to http://prometheus-server.observability." -}}
{{- end -}}
{{- range $role := list "router" "base" "reward" -}}
{{- $pool := index $.Values.autoscaling $role -}}
{{- if $pool.enabled -}}
{{- if gt (int $pool.minReplicas) (int $pool.maxReplicas) -}}
{{- fail (printf "autoscaling.%s.minReplicas is %d, and maxReplicas is %d: the pool cannot be both." $role (int $pool.minReplicas) (int $pool.maxReplicas)) -}}
{{- end -}}
{{- if and (ne $role "router") (not (include "uniarm.signals" (dict "root" $ "role" $role) | fromYamlArray)) -}}
{{- fail (printf "autoscaling.%s has no target, and nothing would scale it: give one of its targets a share, or set autoscaling.%s.enabled to false." $role $role) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and .Values.autoscaling.router.enabled (not (dig "requests" "cpu" "" (default dict .Values.router.resources))) -}}
{{- fail "autoscaling.router keeps routers at a share of the CPU that they request, and router.resources.requests.cpu is not set: set it, or autoscaling.router.enabled to false." -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "uniarm.refuseGateway" -}}
{{- $router := .Values.router -}}
{{- range $name := list "grpc" "http" -}}
{{- $route := index $router.gateway $name -}}
{{- if and $route.hostnames (not $route.parentRefs) -}}
{{- fail (printf "router.gateway.%s.hostnames lists %s, and router.gateway.%s.parentRefs is empty: name the Gateway that takes the route, for instance [{name: public, namespace: gateways}]." $name (first $route.hostnames) $name) -}}
{{- end -}}
{{- if and $route.parentRefs $router.front.clientCaSecret.name -}}
{{- fail (printf "router.front.clientCaSecret asks clients for certificates, and the Gateway of router.gateway.%s ends their connections before a router sees any: let the Gateway ask, or leave router.gateway.%s.parentRefs empty." $name $name) -}}
{{- end -}}
{{- end -}}
{{- if and $router.gateway.http.parentRefs (not $router.http.enabled) -}}
{{- fail "router.gateway.http.parentRefs names a Gateway, and router.http.enabled is false: there is no HTTP to lead to. Set router.http.enabled to true, or leave router.gateway.http.parentRefs empty." -}}
{{- end -}}
{{- range $one := $router.gateway.grpc.parentRefs -}}
{{- range $other := $router.gateway.http.parentRefs -}}
{{- if include "uniarm.oneListener" (dict "root" $ "one" $one "other" $other) -}}
{{- range $host := default (list "*") $router.gateway.grpc.hostnames -}}
{{- range $same := default (list "*") $router.gateway.http.hostnames -}}
{{- if or (eq $host $same) (include "uniarm.matchesHost" (list $host $same)) (include "uniarm.matchesHost" (list $same $host)) -}}
{{- fail (printf "router.gateway.grpc has the host %s and router.gateway.http %s, at the Gateway %s, which takes one kind of route for a host: give the two routes hostnames that differ, or listeners that do (sectionName, port)." $host $same $one.name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Whether two parentRefs may be one listener: where one leaves open which it is, it may be that of the other. Takes root,
     one, other. */}}
{{- define "uniarm.oneListener" -}}
{{- $here := .root.Release.Namespace -}}
{{- $differs := or (ne .one.name .other.name) (ne (default $here .one.namespace) (default $here .other.namespace)) -}}
{{- range $part := list "sectionName" "port" -}}
{{- $both := and (hasKey $.one $part) (hasKey $.other $part) -}}
{{- $differs = or $differs (and $both (ne (index $.one $part | toString) (index $.other $part | toString))) -}}
{{- end -}}
{{- if not $differs -}}true{{- end -}}
{{- end -}}

{{/* Whether a host that may begin with *. takes in another. Takes a list of both. */}}
{{- define "uniarm.matchesHost" -}}
{{- if and (hasPrefix "*" (first .)) (hasSuffix (first . | trimPrefix "*") (last .)) -}}true{{- end -}}
{{- end -}}
