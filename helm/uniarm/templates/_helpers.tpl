{{/* Names, labels, and the parts that the pods of all roles share. */}}

{{/* Long enough for every suffix of ours within the 63 characters of a label. */}}
{{- define "uniarm.name" -}}
{{- if contains "uniarm" .Release.Name -}}
{{- .Release.Name | trunc 46 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-uniarm" .Release.Name | trunc 46 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "uniarm.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "uniarm.name" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* What selects the pods of a role. Never changes: selectors are immutable. Takes (dict "root" $ "role" "router"). */}}
{{- define "uniarm.selector" -}}
app.kubernetes.io/name: uniarm
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .role }}
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

{{/* The flags of every process. Takes root, role, port, adminPort. */}}
{{- define "uniarm.commonArgs" -}}
- --id=$(POD_NAME)
- --listen=0.0.0.0:{{ .port }}
- --admin=0.0.0.0:{{ .adminPort }}
- --advertise=$(POD_IP):{{ .port }}
- --store={{ include "uniarm.store" .root }}
- --log={{ .root.Values.log }}
- --drain-timeout={{ .root.Values.drainTimeoutSeconds }}
{{- with .root.Values.otlpEndpoint }}
- --otlp-endpoint={{ . }}
{{- end }}
{{- end -}}

{{/* What a worker, base or reward, is told besides. Takes the values of its role. */}}
{{- define "uniarm.workerArgs" -}}
- {{ printf "--model=%s" .model | include "uniarm.literal" }}
{{- with .threads }}
- --threads={{ . | int64 }}
{{- end }}
{{- with .kvTokens }}
- --kv-tokens={{ . | int64 }}
{{- end }}
{{- end -}}

{{/* The pod of a role. Takes root, role, values, port, adminPort, args (YAML), worker (whether it holds a model), and httpPort
     where it has one. */}}
{{- define "uniarm.pod" -}}
metadata:
  labels:
    {{- include "uniarm.labels" . | nindent 4 }}
  annotations:
    prometheus.io/scrape: "true"
    prometheus.io/port: {{ .adminPort | quote }}
    prometheus.io/path: /metrics
    {{- with .values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "uniarm.serviceAccount" .root }}
  # Nothing here speaks to the Kubernetes API, and the variables of service links (UNIARM_…_PORT) would read as flags.
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ add .root.Values.drainTimeoutSeconds 10 }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 65532
    runAsGroup: 65532
    fsGroup: 65532
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile:
      type: RuntimeDefault
  {{- with .root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
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
        {{- with .httpPort }}
        - name: http
          containerPort: {{ . }}
        {{- end }}
        - name: admin
          containerPort: {{ .adminPort }}
      {{- if .worker }}
      # Alive is asked only once the model is loaded.
      startupProbe:
        httpGet:
          path: /readyz
          port: admin
        periodSeconds: 5
        failureThreshold: {{ divf .values.startupSeconds 5 | ceil | int64 }}
      {{- end }}
      readinessProbe:
        httpGet:
          path: /readyz
          port: admin
        periodSeconds: 2
        timeoutSeconds: 2
        failureThreshold: 2
      livenessProbe:
        httpGet:
          path: /healthz
          port: admin
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
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities:
          drop: [ALL]
      volumeMounts:
        - name: tmp
          mountPath: /tmp
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
    {{- if .worker }}
    - name: cache
      emptyDir:
        sizeLimit: {{ .root.Values.cacheSize }}
    {{- with .root.Values.modelVolume }}
    - name: models
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- end }}
  {{- with .values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
