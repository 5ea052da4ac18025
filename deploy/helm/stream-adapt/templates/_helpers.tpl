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
