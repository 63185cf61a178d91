{{/* Workers that are several processes each: a StatefulSet for each group, whose pods are its ranks (docs/shards.md). */}}

{{/* What selects a pool's workers: of a group, rank 0 alone answers calls. Takes root, role, values. */}}
{{- define "uniarm.poolSelector" -}}
{{ include "uniarm.selector" . }}
{{- if gt (int .values.shards) 1 }}
apps.kubernetes.io/pod-index: "0"
{{- end }}
{{- end -}}

{{/* The name of a group, which no other of the cluster has: the store does not tell the roles of groups apart. Takes root,
     role, index. */}}
{{- define "uniarm.group" -}}
{{- printf "%s-%s-g%d" (include "uniarm.name" .root) .role (int .index) -}}
{{- end -}}

{{/* The groups of a pool. Takes what uniarm.pod takes. */}}
{{- define "uniarm.groups" -}}
{{- range $index := until (int .values.replicas) }}
{{- $group := merge (dict "group" (include "uniarm.group" (dict "root" $.root "role" $.role "index" $index))) $ }}
---
# Ranks find each other through the store; here they have names in DNS.
apiVersion: v1
kind: Service
metadata:
  name: {{ $group.group }}
  labels:
    {{- include "uniarm.labels" $group | nindent 4 }}
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector:
    {{- include "uniarm.selector" $group | nindent 4 }}
  ports:
    - name: admin
      port: {{ $.adminPort }}
      targetPort: admin
---
# One worker: its ranks are ready when all of them are there, and not ready when one is lost.
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: {{ $group.group }}
  labels:
    {{- include "uniarm.labels" $group | nindent 4 }}
spec:
  serviceName: {{ $group.group }}
  replicas: {{ $.values.shards | int64 }}
  podManagementPolicy: Parallel
  # A rolling update would replace one rank, and wait for ever until it is ready: with flags or a model that the others do not
  # have yet, it never is. And it would begin with all groups at once.
  updateStrategy:
    type: OnDelete
  selector:
    matchLabels:
      {{- include "uniarm.selector" $group | nindent 6 }}
  template:
    {{- $args := include (printf "uniarm.%sArgs" $.role) $group }}
    {{- include "uniarm.pod" (set $group "args" $args) | nindent 4 }}
{{- end }}
{{- end -}}

{{/* Ranks exchange activations hundreds of times a step: the nearer, the faster. Groups outlive each other's nodes. Takes root,
     role, group. */}}
{{- define "uniarm.groupAffinity" -}}
podAffinity:
  preferredDuringSchedulingIgnoredDuringExecution:
    {{- range $topology, $weight := dict "topology.kubernetes.io/zone" 100 "kubernetes.io/hostname" 50 }}
    - weight: {{ $weight }}
      podAffinityTerm:
        topologyKey: {{ $topology }}
        labelSelector:
          matchLabels:
            {{- include "uniarm.selector" $ | nindent 12 }}
    {{- end }}
podAntiAffinity:
  preferredDuringSchedulingIgnoredDuringExecution:
    - weight: 100
      podAffinityTerm:
        topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels:
            {{- include "uniarm.selector" (dict "root" .root "role" .role) | nindent 12 }}
          matchExpressions:
            - { key: uniarm.internal/group, operator: NotIn, values: [{{ .group }}] }
{{- end -}}
