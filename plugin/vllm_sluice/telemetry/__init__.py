"""From a rank's numbers to `/metrics`. Knows Prometheus, does not know torch."""
