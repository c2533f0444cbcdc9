"""A stand-in for a server's /metrics: every metric of the catalogue in the real format, values set by the test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_sluice.telemetry.catalogue import BY_NAME, COMMON_LABELS

COMMON = {"model_name": "org/model", "engine": "0"}
Values = dict[str, dict[tuple[str, ...], float]]


class Exporter(Collector):
    """Exports `values`: metric name to label values (besides the common ones) to value.

    Parameters
    ----------
    labels
        Label names of metrics that the catalogue does not have.
    values
        May be changed at any time.
    """

    def __init__(self, labels: dict[str, tuple[str, ...]], values: Values) -> None:
        self.values = values
        self._labels = {name: metric.labels for name, metric in BY_NAME.items()} | labels

    def collect(self) -> Iterator[Metric]:
        for name, samples in self.values.items():
            labels = [*COMMON_LABELS, *self._labels[name]]
            family: CounterMetricFamily | GaugeMetricFamily
            if name.endswith("_total"):
                family = CounterMetricFamily(name.removesuffix("_total"), "help", labels=labels)
            else:
                family = GaugeMetricFamily(name, "help", labels=labels)
            for chosen, value in dict(samples).items():
                family.add_metric([*COMMON.values(), *chosen], value)
            yield family


@contextmanager
def served(collector: Collector, port: int) -> Iterator[None]:
    """Serve /metrics on a loopback port."""
    registry = CollectorRegistry()
    registry.register(collector)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = generate_latest(registry)
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with running(ThreadingHTTPServer(("127.0.0.1", port), Handler)):
        yield


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[None]:
    """Run a server in a thread."""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
