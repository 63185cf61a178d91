{{/* What scales the pools. HPA, adapter and KEDA get their expressions and their behaviour from here. */}}

{{/* Whether somebody else says how many pods there are. Takes root, role. */}}
{{- define "uniarm.isScaled" -}}
{{- with .root.Values.autoscaling -}}
{{- if and .by (index . $.role).enabled -}}true{{- end -}}
{{- end -}}
{{- end -}}

{{/* Matches the metrics of a pool's pods: no label of a release is in every scrape configuration. Takes root, role. */}}
{{- define "uniarm.podMatchers" -}}
{{- with .root.Values.autoscaling.prometheus -}}
{{- printf "%s=%q,%s=~%q" .namespaceLabel $.root.Release.Namespace .podLabel (printf "%s-%s-.+" (include "uniarm.name" $.root) $.role) -}}
{{- end -}}
{{- end -}}

{{/* The signals of a pool as a list: name, series (that is there whenever the signal is), target, whole (the same number
     whatever the pool's size; else a sum of which a pod should have the target), query. Takes root, role.
     A worker that has not begun says that it has no places: it is left out. The stall is the time that tokens wait for
     their reward over the time that answers take, without the part of a reward step that one row takes as well. */}}
{{- define "uniarm.signals" -}}
{{- $pods := include "uniarm.podMatchers" . -}}
{{- with index .root.Values.autoscaling .role -}}
{{- if eq $.role "base" -}}
{{- with .sequences }}
- name: sequences
  series: uniarm_base_sequences_max
  target: {{ . | toString | quote }}
  query: {{ printf "sum((uniarm_base_sequences_running{%s} + uniarm_base_sequences_waiting{%s}) / (uniarm_base_sequences_max{%s} > 0))" $pods $pods $pods | quote }}
{{- end }}
{{- else -}}
{{- with .sessions }}
- name: sessions
  series: uniarm_reward_sessions_max
  target: {{ . | toString | quote }}
  query: {{ printf "sum(uniarm_reward_sessions{%s} / (uniarm_reward_sessions_max{%s} > 0))" $pods $pods | quote }}
{{- end }}
{{- end }}
{{- with .blocks }}
- name: blocks
  series: uniarm_{{ $.role }}_kv_blocks
  target: {{ . | toString | quote }}
  query: {{ printf "sum(1 - uniarm_%s_kv_free_blocks{%s} / (uniarm_%s_kv_blocks{%s} > 0))" $.role $pods $.role $pods | quote }}
{{- end }}
{{- if eq $.role "reward" -}}
{{- with .stall }}
{{- $base := include "uniarm.podMatchers" (dict "root" $.root "role" "base") }}
{{- $rate := printf "sum(rate(uniarm_base_%%s_seconds_sum{%s}[%ds]))" $base (int $.root.Values.autoscaling.prometheus.rateSeconds) }}
{{- $forward := printf "rate(uniarm_reward_step_forward_seconds_%%s{%s}[%ds])" $pods (int $.root.Values.autoscaling.prometheus.rateSeconds) }}
{{- $kept := printf "sum(uniarm_reward_step_least_seconds{%s} * %s) / clamp_min(sum(%s), 0.001)" $pods (printf $forward "count") (printf $forward "sum") }}
- name: stall
  series: uniarm_base_reward_stall_seconds_sum
  seriesRole: base
  whole: true
  target: {{ . | toString | quote }}
  query: {{ printf "%s / clamp_min(%s + %s, 0.001) * clamp_min(1 - %s, 0)" (printf $rate "reward_stall") (printf $rate "time_to_first_token") (printf $rate "inter_token") $kept | quote }}
{{- end }}
{{- end }}
{{- end -}}
{{- end -}}

{{/* The name of an external metric: no two releases of a cluster share one. Takes root, role, signal. */}}
{{- define "uniarm.externalName" -}}
{{- printf "%s_%s_%s_%s" .root.Release.Namespace (include "uniarm.name" .root) .role .signal | replace "-" "_" | replace "." "_" -}}
{{- end -}}

{{/* Up by the larger of two steps; down by one pod in the time that a pod has to leave. Takes root. */}}
{{- define "uniarm.scalingBehavior" -}}
{{- with .root.Values.autoscaling -}}
scaleUp:
  stabilizationWindowSeconds: {{ .scaleUp.stabilizationSeconds }}
  selectPolicy: Max
  policies:
    - type: Percent
      value: {{ .scaleUp.percent }}
      periodSeconds: {{ .scaleUp.periodSeconds }}
    - type: Pods
      value: {{ .scaleUp.pods }}
      periodSeconds: {{ .scaleUp.periodSeconds }}
scaleDown:
  stabilizationWindowSeconds: {{ .scaleDown.stabilizationSeconds }}
  policies:
    - type: Pods
      value: 1
      periodSeconds: {{ add $.root.Values.drainTimeoutSeconds 10 }}
{{- end -}}
{{- end -}}

{{/* What is scaled. Takes root, role. */}}
{{- define "uniarm.scaleTarget" -}}
apiVersion: apps/v1
kind: {{ eq .role "base" | ternary "StatefulSet" "Deployment" }}
name: {{ include "uniarm.name" .root }}-{{ .role }}
{{- end -}}
