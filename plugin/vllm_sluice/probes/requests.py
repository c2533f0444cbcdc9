"""Requests that ask for their own statistics: what every probe saw of each, kept on the device until they end."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_sluice.compat import Batch
from vllm_sluice.probes.base import Probe
from vllm_sluice.telemetry.request_summary import ARGUMENT, is_ticket

_MOST = 1024
"""Requests kept at most; an aborted one is never asked for and goes when newer ones need the place."""


@dataclass
class RequestRecords:
    """What the probes saw of one request: accumulators by probe kind, and how many tokens."""

    records: dict[str, dict[str, torch.Tensor]]
    tokens: int = 0


class RequestLedger:
    """Keeps the records of the requests that ask, by the ticket in their extra arguments."""

    def __init__(self, probes: Sequence[Probe]) -> None:
        self._probes = probes
        self._open: OrderedDict[str, RequestRecords] = OrderedDict()

    def look(self, batch: Batch, arguments: Sequence[Mapping[str, Any]]) -> list[tuple[RequestRecords, slice]]:
        """Return the asking requests of a pass and their rows; those that come for the first time get a record."""
        found = []
        for index, of_request in enumerate(arguments):
            ticket = of_request.get(ARGUMENT)
            if not is_ticket(ticket):
                continue
            rows = slice(int(batch.starts[index]), int(batch.starts[index + 1]))
            found.append((self._of(str(ticket)), rows))
        return found

    def _of(self, ticket: str) -> RequestRecords:
        if ticket not in self._open:
            self._open[ticket] = RequestRecords({probe.kind: probe.request_record() for probe in self._probes})
            while len(self._open) > _MOST:
                self._open.popitem(last=False)
        self._open.move_to_end(ticket)
        return self._open[ticket]

    def close(self, ticket: str) -> dict[str, Any] | None:
        """Return what was seen of a request as plain numbers and forget it, or None if it never ran here.

        Waits for the device.

        Returns
        -------
        dict
            `{"tokens": int, "probes": {kind: Probe.request_values}}`.
        """
        kept = self._open.pop(ticket, None)
        if kept is None:
            return None
        values = {}
        for probe in self._probes:
            if record := kept.records[probe.kind]:
                host = {name: tensor.cpu().numpy() for name, tensor in record.items()}
                values[probe.kind] = {str(layer): row for layer, row in probe.request_values(host).items()}
        return {"tokens": kept.tokens, "probes": values}
