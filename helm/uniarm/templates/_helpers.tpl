{{/* Names, labels, and the parts that the pods of all roles share. */}}

{{/* Short enough for every suffix of ours within the 63 characters of a label: of a StatefulSet's name, Kubernetes makes one
     with eleven more, and the longest is NAME-reward-g999. */}}
{{- define "uniarm.name" -}}
{{- if contains "uniarm" .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-uniarm" .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "uniarm.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "uniarm.name" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* What selects the pods of a role, or of one group of it. Never changes: selectors are immutable.
     Takes (dict "root" $ "role" "router"), and group (its name) for one of several pods. */}}
{{- define "uniarm.selector" -}}
app.kubernetes.io/name: uniarm
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .role }}
{{- with .group }}
uniarm.internal/group: {{ . }}
{{- end }}
{{- end -}}

{{- define "uniarm.labels" -}}
{{ include "uniarm.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: uniarm
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "uniarm.image" -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}

{{/* The image of a job, which may have one of its own. Takes root, values. */}}
{{- define "uniarm.jobImage" -}}
{{- $own := .values.image | default dict -}}
{{- with .root -}}
{{- printf "%s:%s" (default .Values.image.repository $own.repository) (coalesce $own.tag .Values.image.tag .Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{/* The store's URL, as --store takes it. */}}
{{- define "uniarm.store" -}}
{{- $endpoints := .Values.store.endpoints -}}
{{- if .Values.etcd.enabled -}}
{{- $endpoints = list (printf "%s-etcd:2379" (include "uniarm.name" .)) -}}
{{- end -}}
{{- printf "etcd://%s%s" (join "," $endpoints) (.Values.store.prefix | empty | ternary "" (printf "/%s" (trimPrefix "/" .Values.store.prefix))) -}}
{{- end -}}

{{/* One argument. Kubernetes would expand $(NAME) and shorten $$ in it: a person's text is passed as it was written. */}}
{{- define "uniarm.literal" -}}
{{- . | replace "$" "$$" | quote -}}
{{- end -}}

{{/* The flags of whoever speaks to the store. Takes root. */}}
{{- define "uniarm.storeArgs" -}}
- --store={{ include "uniarm.store" .root }}
{{- with .root.Values.store }}
{{- if .tlsSecret }}
- --store-ca=/store/tls/ca.crt
- --store-cert=/store/tls/tls.crt
- --store-key=/store/tls/tls.key
{{- end }}
{{- if .user }}
- {{ printf "--store-user=%s" .user | include "uniarm.literal" }}
- {{ printf "--store-password-file=/store/password/%s" .passwordSecret.key | include "uniarm.literal" }}
{{- end }}
{{- end }}
{{- end -}}

{{/* The flags of every process. Takes root, role, port, adminPort. */}}
{{- define "uniarm.commonArgs" -}}
- --id=$(POD_NAME)
- --listen=0.0.0.0:{{ .port }}
- --admin=0.0.0.0:{{ .adminPort }}
- --advertise=$(POD_IP):{{ .port }}
{{ include "uniarm.storeArgs" . }}
{{- if .root.Values.tls.enabled }}
- --tls-ca=/tls/ca.crt
- --tls-cert=/tls/tls.crt
- --tls-key=/tls/tls.key
{{- end }}
{{- if .root.Values.tls.admin }}
- --admin-cert=/tls/tls.crt
- --admin-key=/tls/tls.key
{{- end }}
- --log={{ .root.Values.log }}
- --drain-timeout={{ .root.Values.drainTimeoutSeconds }}
{{- with .root.Values.otlpEndpoint }}
- --otlp-endpoint={{ . }}
{{- end }}
{{- end -}}

{{/* What a worker, base or reward, is told besides. Takes values, and group where it is one of several pods. */}}
{{- define "uniarm.workerArgs" -}}
- {{ printf "--model=%s" .values.model | include "uniarm.literal" }}
{{- with .values.threads }}
- --threads={{ . | int64 }}
{{- end }}
{{- with .values.kvTokens }}
- --kv-tokens={{ . | int64 }}
{{- end }}
{{- with .group }}
- --group={{ . }}
- --rank=$(RANK)
- --size={{ $.values.shards | int64 }}
{{- if gt (int $.values.stages) 1 }}
- --stages={{ $.values.stages | int64 }}
{{- end }}
{{- end }}
{{- end -}}

{{/* What every pod is and may do. Takes root, and values where the role has any of its own. */}}
{{- define "uniarm.podBasics" -}}
serviceAccountName: {{ include "uniarm.serviceAccount" .root }}
# Nothing here speaks to the Kubernetes API, and the variables of service links (UNIARM_…_PORT) would read as flags.
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  fsGroup: 65532
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- with .values | default dict }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* On which nodes a pod may run, and beside what. Takes values, and root, role and group where it is one of a group. */}}
{{- define "uniarm.placement" -}}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if .values.affinity }}
affinity:
  {{- toYaml .values.affinity | nindent 2 }}
{{- else if and .group .root.Values.spread }}
affinity:
  {{- include "uniarm.groupAffinity" . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "uniarm.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Where clients inside the cluster find the routers. */}}
{{- define "uniarm.endpoint" -}}
{{- printf "%s://%s:%d" (empty .Values.router.front.tlsSecret | ternary "http" "https") (include "uniarm.name" .) (int64 .Values.router.service.port) -}}
{{- end -}}

{{/* Where the Gateways of the routes are, as a list. */}}
{{- define "uniarm.gatewayNamespaces" -}}
{{- $found := list -}}
{{- with .Values.router.gateway -}}
{{- range concat .grpc.parentRefs .http.parentRefs -}}
{{- $found = append $found (default $.Release.Namespace .namespace) -}}
{{- end -}}
{{- end -}}
{{- $found | uniq | toYaml -}}
{{- end -}}

{{/* The secret with the certificate of a role. Takes root, role. */}}
{{- define "uniarm.tlsSecret" -}}
{{- default (printf "%s-%s-tls" (include "uniarm.name" .root) .role) .root.Values.tls.secret -}}
{{- end -}}

{{/* What the chart's own clients show and trust at the front door. Takes root. */}}
{{- define "uniarm.clientEnv" -}}
{{- with .root.Values.client.apiKeySecret }}
{{- if .name }}
- name: UNIARM_API_KEY
  valueFrom:
    secretKeyRef:
      name: {{ .name }}
      key: {{ .key }}
{{- end }}
{{- end }}
{{- if .root.Values.client.caSecret.name }}
- name: UNIARM_CA
  value: /client/ca.crt
{{- end }}
{{- end -}}

{{- define "uniarm.clientMount" -}}
{{- if .root.Values.client.caSecret.name }}
- name: client-ca
  mountPath: /client
  readOnly: true
{{- end }}
{{- end -}}

{{- define "uniarm.clientVolume" -}}
{{- with .root.Values.client.caSecret }}
{{- if .name }}
- name: client-ca
  secret:
    secretName: {{ .name }}
    items:
      - key: {{ .key }}
        path: ca.crt
{{- end }}
{{- end }}
{{- end -}}

{{/* Where whoever speaks to the store finds its secrets. Takes root. */}}
{{- define "uniarm.storeMounts" -}}
{{- with .root.Values.store }}
{{- if .tlsSecret }}
- name: store-tls
  mountPath: /store/tls
  readOnly: true
{{- end }}
{{- if .user }}
- name: store-password
  mountPath: /store/password
  readOnly: true
{{- end }}
{{- end }}
{{- end -}}

{{- define "uniarm.storeVolumes" -}}
{{- with .root.Values.store }}
{{- if .tlsSecret }}
- name: store-tls
  secret:
    secretName: {{ .tlsSecret }}
{{- end }}
{{- if .user }}
- name: store-password
  secret:
    secretName: {{ .passwordSecret.name }}
{{- end }}
{{- end }}
{{- end -}}

{{/* The pod of a job: one command that ends, and a volume at /data. Takes root, role, values, args (YAML). */}}
{{- define "uniarm.jobPod" -}}
metadata:
  labels:
    {{- include "uniarm.labels" . | nindent 4 }}
  {{- with .adminPort }}
  annotations:
    prometheus.io/scrape: "true"
    prometheus.io/port: {{ . | quote }}
    prometheus.io/path: /metrics
  {{- end }}
spec:
  {{- include "uniarm.podBasics" . | nindent 2 }}
  restartPolicy: Never
  containers:
    - name: {{ .role }}
      image: {{ include "uniarm.jobImage" . }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      args:
        {{- .args | nindent 8 }}
      {{- with .adminPort }}
      ports:
        - name: admin
          containerPort: {{ . }}
      {{- end }}
      env:
        {{- if eq .role "batch" }}
        {{- if not .values.share }}
        - name: PART
          valueFrom:
            fieldRef:
              fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
        {{- end }}
        {{- include "uniarm.clientEnv" . | nindent 8 }}
        {{- end }}
        # Models of the hub: the image's own place for them is no volume here, and cannot be written.
        - name: HF_HOME
          value: /tmp/huggingface
        {{- with .values.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      resources:
        {{- toYaml .values.resources | nindent 8 }}
      securityContext:
        {{- include "uniarm.containerSecurity" . | nindent 8 }}
      volumeMounts:
        - name: tmp
          mountPath: /tmp
        - name: data
          mountPath: /data
        {{- if eq .role "batch" }}
        {{- include "uniarm.clientMount" . | nindent 8 }}
        {{- if .values.share }}
        {{- include "uniarm.storeMounts" . | nindent 8 }}
        {{- end }}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {}
    - name: data
      {{- toYaml .values.volume | nindent 6 }}
    {{- if eq .role "batch" }}
    {{- include "uniarm.clientVolume" . | nindent 4 }}
    {{- if .values.share }}
    {{- include "uniarm.storeVolumes" . | nindent 4 }}
    {{- end }}
    {{- end }}
  {{- with include "uniarm.placement" . | trim }}
  {{- . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* How the kubelet asks the admin port; it takes any certificate, and shows none. Takes root. */}}
{{- define "uniarm.probeScheme" -}}
scheme: {{ .root.Values.tls.admin | ternary "HTTPS" "HTTP" }}
{{- end -}}

{{/* The pod of a role. Takes root, role, values, port, adminPort, args (YAML), worker (whether it
     holds a model), group (that it is a rank of), httpPort (of the HTTP front door, if it has one). */}}
{{- define "uniarm.pod" -}}
metadata:
  labels:
    {{- include "uniarm.labels" . | nindent 4 }}
  annotations:
    prometheus.io/scrape: "true"
    prometheus.io/port: {{ .adminPort | quote }}
    {{- if .root.Values.tls.admin }}
    prometheus.io/scheme: https
    {{- end }}
    prometheus.io/path: /metrics
    {{- with .values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- include "uniarm.podBasics" . | nindent 2 }}
  terminationGracePeriodSeconds: {{ add .root.Values.drainTimeoutSeconds 10 }}
  {{- if and .root.Values.spread (not .group) }}
  # A node, or a zone, that is lost takes as few of a pool as can be; better together than not at all.
  topologySpreadConstraints:
    {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
    - maxSkew: 1
      topologyKey: {{ . }}
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "uniarm.selector" $ | nindent 10 }}
    {{- end }}
  {{- end }}
  containers:
    - name: {{ .role }}
      image: {{ include "uniarm.image" .root }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      args:
        - {{ .role }}
        {{- .args | nindent 8 }}
      env:
        - name: POD_NAME
          valueFrom:
            fieldRef:
              fieldPath: metadata.name
        - name: POD_IP
          valueFrom:
            fieldRef:
              fieldPath: status.podIP
        {{- if .group }}
        - name: RANK
          valueFrom:
            fieldRef:
              fieldPath: metadata.labels['apps.kubernetes.io/pod-index']
        {{- end }}
        {{- if and .worker (not .values.threads) (dig "requests" "cpu" "" .values.resources) }}
        # Whole CPUs, rounded up. A worker by itself would take half of the node's.
        - name: UNIARM_THREADS
          valueFrom:
            resourceFieldRef:
              resource: requests.cpu
        {{- end }}
        {{- with .values.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        - name: grpc
          containerPort: {{ .port }}
        - name: admin
          containerPort: {{ .adminPort }}
        {{- with .httpPort }}
        - name: http
          containerPort: {{ . }}
        {{- end }}
      {{- if .worker }}
      # Alive is asked only once the model is loaded.
      startupProbe:
        httpGet:
          path: /readyz
          port: admin
          {{- include "uniarm.probeScheme" . | nindent 10 }}
        periodSeconds: 5
        failureThreshold: {{ divf .values.startupSeconds 5 | ceil | int64 }}
      {{- end }}
      readinessProbe:
        httpGet:
          path: /readyz
          port: admin
          {{- include "uniarm.probeScheme" . | nindent 10 }}
        periodSeconds: 2
        timeoutSeconds: 2
        failureThreshold: 2
      livenessProbe:
        httpGet:
          path: /healthz
          port: admin
          {{- include "uniarm.probeScheme" . | nindent 10 }}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 6
      {{- if not .worker }}
      # The Service forgets a terminating pod a moment after the pod is told: until then, connections are still welcome.
      lifecycle:
        preStop:
          sleep:
            seconds: 5
      {{- end }}
      resources:
        {{- toYaml .values.resources | nindent 8 }}
      securityContext:
        {{- include "uniarm.containerSecurity" . | nindent 8 }}
      volumeMounts:
        - name: tmp
          mountPath: /tmp
        {{- if .root.Values.tls.enabled }}
        - name: tls
          mountPath: /tls
          readOnly: true
        {{- end }}
        {{- with .values.front | default dict }}
        {{- if .tlsSecret }}
        - name: front-tls
          mountPath: /front/tls
          readOnly: true
        {{- end }}
        {{- if dig "clientCaSecret" "name" "" . }}
        - name: front-clients
          mountPath: /front/clients
          readOnly: true
        {{- end }}
        {{- if dig "tenants" "name" "" . }}
        - name: tenants
          mountPath: /front/tenants
          readOnly: true
        {{- end }}
        {{- if .auditVolume }}
        # A folder belongs to one router.
        - name: audit
          mountPath: /audit
          subPathExpr: $(POD_NAME)
        {{- end }}
        {{- end }}
        {{- include "uniarm.storeMounts" . | nindent 8 }}
        {{- if .worker }}
        - name: cache
          mountPath: /cache
        {{- if .root.Values.modelVolume }}
        - name: models
          mountPath: /models
          readOnly: true
        {{- end }}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {}
    {{- if .root.Values.tls.enabled }}
    - name: tls
      secret:
        secretName: {{ include "uniarm.tlsSecret" . }}
    {{- end }}
    {{- with .values.front | default dict }}
    {{- if .tlsSecret }}
    - name: front-tls
      secret:
        secretName: {{ .tlsSecret }}
    {{- end }}
    {{- if dig "clientCaSecret" "name" "" . }}
    - name: front-clients
      secret:
        secretName: {{ .clientCaSecret.name }}
    {{- end }}
    {{- if dig "tenants" "name" "" . }}
    - name: tenants
      secret:
        secretName: {{ .tenants.name }}
    {{- end }}
    {{- with .auditVolume }}
    - name: audit
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- end }}
    {{- include "uniarm.storeVolumes" . | nindent 4 }}
    {{- if .worker }}
    - name: cache
      emptyDir:
        sizeLimit: {{ .root.Values.cacheSize }}
    {{- with .root.Values.modelVolume }}
    - name: models
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- end }}
  {{- with include "uniarm.placement" . | trim }}
  {{- . | nindent 2 }}
  {{- end }}
{{- end -}}
