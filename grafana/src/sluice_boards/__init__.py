"""Sluice's Grafana dashboards as plain dicts: `panels` and `board` build them, one module a board."""
