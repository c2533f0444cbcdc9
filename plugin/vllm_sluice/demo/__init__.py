"""`sluice demo`: a server, traffic of book passages, Prometheus, and what to look at."""
