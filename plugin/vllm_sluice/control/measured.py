"""What the journal says as metrics, the same from every API server."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_sluice.control.journal import Journal

_RESULTS = {"applied": "applied", "rolled back": "rolled_back", "failed": "failed", "tried": "tried"}


def server_values(journal: Journal) -> Iterator[tuple[str, tuple[tuple[str, str], ...], float]]:
    """Yield metric, labels besides the common ones, and value."""
    record = journal.read()
    switching = record.switching is not None and bool(record.switching["paused"])
    yield "sluice_engine_paused", (), float(switching or record.paused_since is not None)
    for result, label in _RESULTS.items():
        yield "sluice_switches_total", (("result", label),), float(record.results.get(result, 0))
    yield "sluice_switch_seconds_total", (), float(record.results.get("seconds", 0.0))
    if record.guard is not None:
        patch = ("patch", record.guard["patch"])
        yield "sluice_guard_running", (patch,), 1.0
        for group, measured in (record.guard["measured"] or {}).items():
            labels = (patch, ("group", group))
            yield "sluice_guard_tokens", labels, float(measured["tokens"])
            yield "sluice_guard_nonfinite", labels, float(measured["nonfinite"])
            if measured["mean"] is not None:
                yield "sluice_guard_logprob", labels, float(measured["mean"])
    if record.file is not None:
        yield "sluice_config_file_good", (), float(record.file["good"])
        yield "sluice_config_restart_needed", (), float(len(record.file["restart_needed"]))
