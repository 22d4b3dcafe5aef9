"""What is known about a running service: logs, metrics, traces, starts.

logs.py             structured logs: one set-up, one catalogue of events, one net for secrets
metrics.py          the metrics of a replica and of an ingress
prometheus.py       one page of the whole service's metrics
cold_start.py       where a start's seconds went
rollout_history.py  what gates, deploys and rollbacks decided; grants lost and regained
tracing.py          Serve's traces to an OpenTelemetry collector
"""
