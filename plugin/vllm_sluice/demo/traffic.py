"""Endless traffic of book passages for the demo, through the official OpenAI client."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openai import OpenAI

_CHARACTERS_A_TOKEN = 2.5
"""Low for any tokenizer on English text, so that a prompt does not outgrow its share of the context."""
_LONGEST_PROMPT = 600
_SHORTEST_PROMPT = 16
_REPEATED_SHARE = 0.2


@dataclass(frozen=True)
class Totals:
    """What has been sent and received; tokens include prompts."""

    requests: int = 0
    tokens: int = 0
    errors: int = 0
    last_error: str = ""


def passages() -> list[str]:
    """Return the paragraphs of the packaged sample text, its first line (what it is) aside."""
    text = resources.files("vllm_sluice.demo").joinpath("passages.txt").read_text(encoding="utf-8")
    return text.partition("\n\n")[2].strip().split("\n\n")


class PromptSource:
    """Draws prompts of very different length; one in five repeats an earlier one, as chats and templates do."""

    def __init__(self, paragraphs: Sequence[str], context: int, seed: int) -> None:
        self._paragraphs = paragraphs
        self._longest = max(_SHORTEST_PROMPT, min(_LONGEST_PROMPT, context // 2))
        self._room = max(1, context - self._longest - 8)
        self._random = random.Random(seed)
        self._earlier: list[str] = []

    def draw(self) -> tuple[str, int]:
        """Return a prompt and `max_tokens`."""
        max_tokens = min(self._random.choice((8, 16, 32, 64, 96)), self._room)
        if self._earlier and self._random.random() < _REPEATED_SHARE:
            return self._random.choice(self._earlier), max_tokens
        ratio = self._longest / _SHORTEST_PROMPT
        length = int(_SHORTEST_PROMPT * ratio ** self._random.random() * _CHARACTERS_A_TOKEN)
        start = self._random.randrange(len(self._paragraphs))
        prompt = ""
        for step in range(len(self._paragraphs)):
            prompt += self._paragraphs[(start + step) % len(self._paragraphs)] + "\n\n"
            if len(prompt) >= length:
                break
        prompt = prompt[:length].rsplit(" ", 1)[0].rstrip()
        self._earlier = [*self._earlier[-31:], prompt]
        return prompt, max_tokens


class Traffic:
    """Sends requests from a few threads until stopped.

    The OpenAI client, which takes a while to load, is loaded here: once `start` returns, requests are under way.
    """

    def __init__(self, base_url: str, model: str, context: int, clients: int) -> None:
        from openai import OpenAI

        self._model = model
        self._totals = Totals()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._send,
                args=(
                    OpenAI(base_url=base_url, api_key="not-needed", max_retries=0, timeout=120),
                    PromptSource(passages(), context, seed),
                ),
                daemon=True,
            )
            for seed in range(clients)
        ]

    def start(self) -> None:
        """Begin to send."""
        for thread in self._threads:
            thread.start()

    def stop(self, patience: float = 2.0) -> None:
        """Send nothing new; wait a moment for what is under way."""
        self._stopping.set()
        end = time.monotonic() + patience
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    @property
    def totals(self) -> Totals:
        """Return what was sent and received so far."""
        with self._lock:
            return self._totals

    def _send(self, client: OpenAI, prompts: PromptSource) -> None:
        from openai import OpenAIError

        pause = random.Random()
        while not self._stopping.is_set():
            prompt, max_tokens = prompts.draw()
            try:
                answer = client.completions.create(
                    model=self._model, prompt=prompt, max_tokens=max_tokens, temperature=0.8
                )
                self._count(answer.usage.total_tokens if answer.usage else 0, "")
            except OpenAIError as error:
                self._count(0, str(error) or type(error).__name__)
                self._stopping.wait(1.0)
            self._stopping.wait(pause.expovariate(4.0))

    def _count(self, tokens: int, error: str) -> None:
        with self._lock:
            now = self._totals
            self._totals = Totals(
                now.requests + (not error), now.tokens + tokens, now.errors + bool(error), error or now.last_error
            )
