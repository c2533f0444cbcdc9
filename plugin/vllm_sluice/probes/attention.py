"""The `attention` probe: exact attention probabilities of sampled queries.

The attention kernel keeps no probabilities. The graph copies the queries of a few sampled rows; right after the
forward pass their probabilities are recomputed from the paged KV cache, whose blocks no later step has touched yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from vllm_sluice import compat
from vllm_sluice.compat import AttentionShape, AttentionSite, Batch
from vllm_sluice.config import AttentionProbe, runtime_values
from vllm_sluice.ops.attention import probabilities, summarise
from vllm_sluice.probes.base import Probe, Record, Reduction
from vllm_sluice.probes.pace import Pace
from vllm_sluice.telemetry.catalogue import layer_label
from vllm_sluice.telemetry.snapshot import Series

_METRICS = ("sink_mass", "first4_mass", "entropy_ratio", "sink_heads", "heads")


class QueryCopy(nn.Module):
    """Copies the sampled rows of a layer's queries into a fixed buffer, [queries, heads, head_dim]."""

    sample: torch.Tensor
    queries: torch.Tensor

    def __init__(self, site: AttentionSite, sample: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        width = compat.key_size(site.attention)
        self.register_buffer("sample", sample, persistent=False)
        buffer = torch.zeros(len(sample), site.heads, width, dtype=dtype, device=sample.device)
        self.register_buffer("queries", buffer, persistent=False)

    def forward(self, query: torch.Tensor) -> None:
        """Copy; traced into the model's graph. `query` is [tokens, heads * head_dim] or [tokens, heads, head_dim]."""
        _, heads, width = self.queries.shape
        self.queries.copy_(query.view(-1, heads, width).index_select(0, self.sample))


class InstalledAttention(Probe):
    """The installed `attention` probe of one rank.

    `by_request` doubles the sampled queries: the second half is for requests that ask for their own statistics, so
    that they do not weigh more than others in the server's.
    """

    kind = "attention"
    reductions: ClassVar[dict[str, Reduction]] = {"sums": "sum", "queries": "sum", "phases": "sum"}

    def __init__(self, settings: AttentionProbe, sites: list[AttentionSite], dtype: torch.dtype,
                 device: torch.device, by_request: bool = False) -> None:
        self.runtime = {}
        self.set(runtime_values(settings))
        self._settings = settings
        self._sites = sites
        self.layers = [site.layer for site in sites]
        self._shapes: list[AttentionShape] = [compat.attention_shape(site.attention) for site in sites]
        self._sample = torch.zeros(settings.queries * (1 + by_request), dtype=torch.int64, device=device)
        self._by_request = by_request
        self._asked: list[np.ndarray] = []
        self._stands_for: list[float] = []
        self._turn = 0
        self._copies = [QueryCopy(site, self._sample, dtype) for site in sites]
        heads = max(site.heads for site in sites)
        self._sums = torch.zeros(len(sites), 3, heads, dtype=torch.float64, device=device)
        self._queries = torch.zeros(len(sites), dtype=torch.int64, device=device)
        self._phases = np.zeros(2, dtype=np.int64)
        self._chosen = np.zeros(0, dtype=np.int64)
        for site, copy in zip(sites, self._copies, strict=True):
            site.attention.sluice_query_copy = copy
            compat.override_forward(site.attention, _copy_query)

    def before(self, batch: Batch) -> None:
        """Choose the queries of this pass: spread evenly over those past position 0 and within max_context."""
        self._chosen = self._chosen[:0]
        if not batch.attention or not self.pace.due():
            return
        self._chosen = _spread(self._eligible(batch, np.arange(batch.tokens)), self._settings.queries)
        self._write(0, self._chosen)

    def before_requests(self, batch: Batch, rows: Sequence[slice]) -> None:
        """Share `queries` out among the asking requests, and choose each one's by the same rule.

        Where there are more requests than queries, it is the turn of others in the next pass.
        """
        self._asked, self._stands_for = [], []
        if not batch.attention:
            return
        eligible = [self._eligible(batch, np.arange(own.start, own.stop)) for own in rows]
        self._turn += 1
        shares = fair_shares([len(own) for own in eligible], self._settings.queries, self._turn)
        self._asked = [_spread(own, share) for own, share in zip(eligible, shares, strict=True)]
        self._stands_for = [len(own) / max(share, 1) for own, share in zip(eligible, shares, strict=True)]
        self._write(self._settings.queries, np.concatenate(self._asked))

    def _eligible(self, batch: Batch, rows: np.ndarray) -> np.ndarray:
        position = batch.position_of(rows)
        return rows[(position >= 1) & (position < self._settings.max_context)]

    def _write(self, first: int, rows: np.ndarray) -> None:
        padded = np.zeros(self._settings.queries, dtype=np.int64)
        padded[: len(rows)] = rows
        self._sample[first : first + len(padded)].copy_(torch.from_numpy(padded), non_blocking=True)

    def after(self, batch: Batch) -> None:
        """Recompute the probabilities of the chosen queries and add their summaries."""
        if len(self._chosen) == 0:
            return
        began = self.pace.now()
        try:
            self._add(batch)
        finally:
            # An index beyond the next, smaller batch would stop the model.
            self._sample[: self._settings.queries].zero_()
            self.pace.sampled(began)

    def request_record(self) -> dict[str, torch.Tensor]:
        """Make accumulators of a request, each [L].

        Mass on position 0 summed over heads, queries weighed by the tokens that they stand for, float64; these weights'
        sum, float64; number of queries, int64.
        """
        if not self._by_request:
            return {}
        layers, device = len(self._sites), self._sample.device
        return {
            "sink_mass": torch.zeros(layers, dtype=torch.float64, device=device),
            "weight": torch.zeros(layers, dtype=torch.float64, device=device),
            "queries": torch.zeros(layers, dtype=torch.int64, device=device),
        }

    def add_requests(
        self, batch: Batch, rows: Sequence[slice], records: Sequence[dict[str, torch.Tensor]]
    ) -> None:
        """Recompute the probabilities of the asking requests' queries and add the mass on position 0.

        Queries that are not finite are left out.
        """
        asked = np.concatenate(self._asked) if self._asked else np.zeros(0, dtype=np.int64)
        if len(asked) == 0:
            return
        ends = np.cumsum([len(own) for own in self._asked]).tolist()
        try:
            for index, summary, counted in self._summaries(batch, self._settings.queries, asked):
                mass = summary[0].sum(dim=1)
                kept = counted * torch.isfinite(mass)
                mass = torch.where(kept > 0, mass, 0.0)
                for end, own, weight, record in zip(ends, self._asked, self._stands_for, records, strict=True):
                    span = slice(end - len(own), end)
                    record["sink_mass"][index] += weight * mass[span].sum()
                    record["weight"][index] += weight * kept[span].sum()
                    record["queries"][index] += kept[span].sum()
        finally:
            self._sample[self._settings.queries :].zero_()

    def request_values(self, record: Record) -> dict[int, list[float]]:
        """Return by layer: mass on position 0 summed over heads and tokens, heads times tokens, and queries."""
        columns = zip(self._sites, *(record[name].tolist() for name in ("sink_mass", "weight", "queries")), strict=True)
        return {site.layer: [mass, weight * site.heads, queries] for site, mass, weight, queries in columns if queries}

    def _add(self, batch: Batch) -> None:
        for index, summary, counted in self._summaries(batch, 0, self._chosen):
            self._sums[index, :, : summary.shape[2]] += summary.sum(dim=1)
            self._queries[index] += counted.sum()
        position, prompts = batch.position_of(self._chosen), batch.prompts[batch.request_of(self._chosen)]
        prefill = int((position < prompts).sum())
        self._phases += (prefill, len(self._chosen) - prefill)

    def _summaries(
        self, batch: Batch, first: int, rows: np.ndarray
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Recompute the queries of `rows`, which `_write(first, rows)` had copied.

        Yields index of the site, `ops.attention.summarise` in float64 with 0 for queries that do not count,
        [3, queries, heads], and whether they count, int64, [queries].
        """
        request, position = batch.request_of(rows), batch.position_of(rows)
        device = self._sample.device
        requests = torch.from_numpy(request.astype(np.int64)).to(device, non_blocking=True)
        copied = slice(first, first + len(rows))
        # From the device: with speculative decoding the host's count of computed tokens may lag.
        positions = batch.positions[self._sample[copied]].long()
        longest = int(position.max()) + 1
        for index, (site, shape, copy) in enumerate(zip(self._sites, self._shapes, self._copies, strict=True)):
            if not self.looks_at(site.layer):
                continue
            counted = torch.ones_like(positions)
            if shape.window:  # position 0 has left the window of later queries: they say nothing about the sink
                counted = (positions < shape.window).long()
            blocks = -(-longest // compat.block_size(site.attention))
            table = compat.block_table(batch.attention[site.name])[requests, :blocks].long()
            keys = compat.cached_keys(site.attention, table)
            probability = probabilities(copy.queries[copied], keys, positions, shape.scale, shape.soft_cap)
            yield index, summarise(probability, positions).double() * counted.view(1, -1, 1), counted

    def set(self, values: Mapping[str, Any]) -> None:
        """Take `enabled`, `layers` and `interval_seconds`."""
        super().set(values)
        self.pace = Pace(self.runtime["interval_seconds"])

    def take(self) -> dict[str, torch.Tensor]:
        """Return and reset: sums [L, 3, heads], queries [L], phases [2] (prefill, decode)."""
        taken = {
            "sums": self._sums.clone(),
            "queries": self._queries.clone(),
            "phases": torch.from_numpy(self._phases.copy()),
        }
        self._sums.zero_()
        self._queries.zero_()
        self._phases[:] = 0
        return taken

    def series(self) -> list[Series]:
        """Name the series: layer by layer, then the queries sampled by phase."""
        named = []
        for site in self._sites:
            named += [
                Series(f"sluice_attention_{name}", (("layer", layer_label(site.layer)),)) for name in _METRICS
            ]
        return named + [Series("sluice_queries_sampled_total", (("phase", p),)) for p in ("prefill", "decode")]

    def values(self, window: Record | None, total: Record | None) -> np.ndarray:
        """Fill the series; a head is a sink head if its mean mass over the window is above the threshold."""
        layers = np.full((len(self._sites), len(_METRICS)), np.nan)
        if window is not None:
            for index, site in enumerate(self._sites):
                count = window["queries"][index]
                if count and self.looks_at(site.layer):
                    mean = window["sums"][index, :, : site.heads] / count
                    sinks = (mean[0] > self._settings.sink_threshold).sum()
                    layers[index] = [*mean.mean(axis=1), sinks, site.heads]
        phases = np.zeros(2) if total is None else total["phases"]
        return np.concatenate([layers.reshape(-1), phases])


def fair_shares(wanted: Sequence[int], most: int, turn: int) -> list[int]:
    """Share `most` out among those who want some: what one leaves goes to the others; ties go round with `turn`."""
    shares = [0] * len(wanted)
    order = sorted(range(len(wanted)), key=lambda index: (wanted[index], (index + turn) % len(wanted)))
    for served, index in enumerate(order):
        shares[index] = min(wanted[index], most // (len(wanted) - served))
        most -= shares[index]
    return shares


def _spread(rows: np.ndarray, most: int) -> np.ndarray:
    """Return at most `most` of the rows, spread evenly."""
    count = min(most, len(rows))
    return rows[((np.arange(count) + 0.5) * len(rows) / max(count, 1)).astype(np.int64)]


def sampling_problem(site: AttentionSite) -> str | None:
    """Say why a layer's attention cannot be recomputed, or None if it can."""
    if site.is_mla:
        return "multi-head latent attention keeps latent keys"
    try:
        compat.attention_shape(site.attention)
    except NotImplementedError as error:
        return str(error)
    return None


def _copy_query(original: Any) -> Any:
    def forward(self: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.sluice_query_copy(query)
        return original(self, query, *args, **kwargs)

    return forward
