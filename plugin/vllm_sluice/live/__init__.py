"""The small built-in page: the last hour of every layer in a browser, where no Grafana is at hand."""
