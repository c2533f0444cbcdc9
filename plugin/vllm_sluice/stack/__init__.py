"""Several programs as one: the server, Prometheus, Alertmanager and Grafana, started and stopped together."""

DEFAULT_MODEL = "models/twin-gated"
