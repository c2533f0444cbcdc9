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
"""Tickets kept at most; that of an aborted request is never asked for and goes when newer ones need the place."""


@dataclass
class RequestRecords:
    """What the probes saw of one request: accumulators by probe kind, and how many tokens."""

    records: dict[str, dict[str, torch.Tensor]]
    tokens: int = 0


class RequestLedger:
    """Keeps the records of the requests that ask, by the ticket in their extra arguments.

    One ticket may stand for several requests: the samples of one prompt.
    """

    def __init__(self, probes: Sequence[Probe]) -> None:
        self._probes = probes
        self._open: OrderedDict[str, dict[str, RequestRecords]] = OrderedDict()
        self._closed: OrderedDict[str, None] = OrderedDict()

    def look(self, batch: Batch, arguments: Sequence[Mapping[str, Any]]) -> list[tuple[RequestRecords, slice]]:
        """Return the asking requests of a pass and their rows.

        A request that starts with this pass gets a new record; also one that was preempted and is computed again, which
        may be under another state of the patches.
        """
        found = []
        for index, of_request in enumerate(arguments):
            ticket = of_request.get(ARGUMENT)
            if not is_ticket(ticket) or ticket in self._closed:  # a pass may run ahead of the request's end
                continue
            of_ticket = self._of(str(ticket))
            name = batch.requests[index]
            if name not in of_ticket or batch.computed[index] == 0:
                of_ticket[name] = RequestRecords({probe.kind: probe.request_record() for probe in self._probes})
            found.append((of_ticket[name], slice(int(batch.starts[index]), int(batch.starts[index + 1]))))
        return found

    def _of(self, ticket: str) -> dict[str, RequestRecords]:
        _remember(self._open, ticket, self._open.get(ticket, {}))
        return self._open[ticket]

    def close(self, ticket: str) -> dict[str, Any]:
        """Return what was seen of the ticket's requests as plain numbers and forget them; `{}` if nothing was.

        Waits for the device.

        Returns
        -------
        dict
            Request to `{"tokens": int, "probes": {kind: Probe.request_values}}`.
        """
        _remember(self._closed, ticket, None)
        return {name: self._values(records) for name, records in self._open.pop(ticket, {}).items()}

    def _values(self, kept: RequestRecords) -> dict[str, Any]:
        values = {}
        for probe in self._probes:
            if record := kept.records[probe.kind]:
                host = {name: tensor.cpu().numpy() for name, tensor in record.items()}
                values[probe.kind] = {str(layer): row for layer, row in probe.request_values(host).items()}
        return {"tokens": kept.tokens, "probes": values}


def _remember(memory: OrderedDict[str, Any], ticket: str, value: Any) -> None:
    memory[ticket] = value
    memory.move_to_end(ticket)
    while len(memory) > _MOST:
        memory.popitem(last=False)
