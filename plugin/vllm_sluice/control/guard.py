"""The guard: a patch is switched for a share of the requests first, and for all only if that share did no worse.

Requests that choose nothing themselves are put into two groups by a hash of their id: `canary` runs under the new
state, `rest` under the server's. The workers add up the log-probability of every token that either group generates,
and count logits that are not finite. Over a window the means are compared, both ways: a model that is broken may be
surer of what it says. The texts differ, so the difference has an error; requests, not tokens, were put into the groups
by chance, so it is that of a mean over requests of unequal length.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vllm_sluice.config import Guard

GROUPS = ("rest", "canary")
ARGUMENT = "sluice.guard"
"""Request argument, added by the API server, that tells the workers a trial's number, the group and the request:
`NUMBER:GROUP:REQUEST`. Several answers to one request share it."""


@dataclass(frozen=True)
class Measured:
    """What one group generated.

    Attributes
    ----------
    tokens, total
        Tokens, and the sum of their log-probabilities, nats.
    nonfinite
        Rows of logits with NaN or infinity; they are not in `tokens`.
    requests
        Requests with a token; several answers to one prompt are one request.
    tokens_squared, tokens_total, total_squared
        Sums over requests of n^2, n s and s^2, where n are the tokens of a request and s the sum of theirs.
    """

    tokens: float = 0
    total: float = 0.0
    nonfinite: float = 0
    requests: float = 0
    tokens_squared: float = 0.0
    tokens_total: float = 0.0
    total_squared: float = 0.0

    def __add__(self, other: Measured) -> Measured:
        return Measured(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def mean(self) -> float:
        """Mean log-probability, nats; NaN without tokens."""
        return self.total / self.tokens if self.tokens else math.nan

    @property
    def error(self) -> float:
        """Standard error of the mean: tokens of one request are not independent, requests are.

        That of a ratio estimate (Cochran, Sampling Techniques, 3rd ed. 1977, section 2.11), with m the mean:
        sqrt(k / (k - 1) sum_requests (s - m n)^2) / sum_requests n. Infinite with fewer than two requests.
        """
        if self.requests < 2:
            return math.inf
        squares = self.total_squared - 2 * self.mean * self.tokens_total + self.mean**2 * self.tokens_squared
        return math.sqrt(max(0.0, squares) * self.requests / (self.requests - 1)) / self.tokens

    @property
    def nonfinite_rate(self) -> float:
        """Rows of logits with NaN or infinity, per generated token."""
        rows = self.tokens + self.nonfinite
        return self.nonfinite / rows if rows else 0.0


@dataclass(frozen=True)
class Verdict:
    """What to do with a trial, and why."""

    action: Literal["wait", "complete", "roll back"]
    reason: str


def group_of(request_id: str, number: int, share: float) -> str:
    """Put a request into a group; the same request into the same group in every process."""
    digest = hashlib.sha256(f"{number}:{request_id}".encode()).digest()
    return "canary" if int.from_bytes(digest[:8]) < share * 2**64 else "rest"


def combine(replies: Iterable[Mapping[str, Any]], number: int) -> dict[str, Measured]:
    """Add up what the engines measured; of an engine's ranks all that sample have the same."""
    by_engine: dict[str, dict[str, Measured]] = {}
    for reply in replies:
        if reply.get("number") != number:
            continue
        found = {group: Measured(**reply["groups"][group]) for group in GROUPS}
        known = by_engine.get(reply["engine"])
        if known is None or sum(m.tokens for m in found.values()) > sum(m.tokens for m in known.values()):
            by_engine[reply["engine"]] = found
    return {group: sum((engine[group] for engine in by_engine.values()), Measured()) for group in GROUPS}


def judge(measured: Mapping[str, Measured], seconds: float, settings: Guard) -> Verdict:
    """Decide on a trial that has run for `seconds`."""
    canary, rest = measured["canary"], measured["rest"]
    if canary.nonfinite and canary.nonfinite_rate > rest.nonfinite_rate:
        return Verdict(
            "roll back",
            f"non-finite logits: {canary.nonfinite_rate:.2%} of the canary's rows, "
            f"{rest.nonfinite_rate:.2%} of the rest's",
        )
    tokens, requests = min(canary.tokens, rest.tokens), min(canary.requests, rest.requests)
    late = seconds > settings.patience_seconds
    if tokens < settings.least_tokens or requests < settings.least_requests:
        text = (
            f"{tokens:.0f} of {settings.least_tokens} tokens, {requests:.0f} of {settings.least_requests} requests "
            f"in the smaller group after {seconds:.0f} s"
        )
        return Verdict("roll back" if late else "wait", text)
    change = canary.mean - rest.mean
    error = math.hypot(canary.error, rest.error)
    text = f"mean log-probability {canary.mean:.3f} against {rest.mean:.3f} nats ({change:+.3f}, error {error:.3f})"
    if not math.isfinite(change) or abs(change) - 2 * error > settings.most_change:
        return Verdict("roll back", f"{text}; a change of {settings.most_change:g} is allowed")
    if seconds >= settings.window_seconds and abs(change) + 2 * error <= settings.most_change:
        return Verdict("complete", text)
    return Verdict("roll back" if late else "wait", f"{text}; no verdict after {seconds:.0f} s")
