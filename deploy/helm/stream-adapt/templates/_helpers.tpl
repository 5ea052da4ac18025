{{/* The job's name in Prometheus is that of the service: the rules look for stream-adapt in it. */}}
{{- define "stream-adapt.name" -}}
{{- if contains "stream-adapt" .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-stream-adapt" (.Release.Name | trunc 39 | trimSuffix "-") -}}
{{- end -}}
{{- end -}}

{{- define "stream-adapt.selector" -}}
app.kubernetes.io/name: stream-adapt
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "stream-adapt.labels" -}}
{{ include "stream-adapt.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{/* What pods of members and of the refresh have in common. */}}
{{- define "stream-adapt.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "stream-adapt.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "stream-adapt.env" -}}
- name: STREAM_ADAPT_APP_INSTANCE
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
{{- range $name, $from := .Values.secretEnv }}
- name: {{ $name }}
  valueFrom: {secretKeyRef: {name: {{ $from.secret }}, key: {{ $from.key }}}}
{{- end }}
{{- end -}}

{{- define "stream-adapt.mounts" -}}
- {name: config, mountPath: /etc/stream-adapt/stream-adapt.yaml, subPath: stream-adapt.yaml, readOnly: true}
- {name: state, mountPath: /var/lib/stream-adapt}
- {name: cache, mountPath: /var/cache/stream-adapt}
- {name: tmp, mountPath: /tmp}
{{- range .Values.secretFiles }}
- {name: secret-{{ . }}, mountPath: /etc/stream-adapt/secrets/{{ . }}, readOnly: true}
{{- end }}
{{- end -}}

{{- define "stream-adapt.volumes" -}}
- name: config
  configMap: {name: {{ include "stream-adapt.name" . }}}
- name: cache
  emptyDir: {}
- name: tmp
  emptyDir: {}
{{- range .Values.secretFiles }}
- name: secret-{{ . }}
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- end -}}
