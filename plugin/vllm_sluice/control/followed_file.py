"""The configuration file while the server runs: read again when it changes, and never worse than the last good one."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from vllm_sluice import config
from vllm_sluice.config import Loaded
from vllm_sluice.control import state
from vllm_sluice.control.journal import Journal, stamp

logger = logging.getLogger("vllm.sluice.control")


@dataclass(frozen=True)
class FileState:
    """The configuration file as last seen."""

    path: str
    good: bool = True
    error: str | None = None
    restart_needed: tuple[str, ...] = ()


class FollowedFile:
    """File, environment and defaults as they are now.

    Parameters
    ----------
    journal
        What the API servers share: another one may have read the file more lately.
    started
        The configuration that the server was started with.

    Attributes
    ----------
    state
        The file as last seen; None without a file.
    """

    def __init__(self, journal: Journal, started: Loaded) -> None:
        self._journal = journal
        self._started = started
        self._path = os.environ.get(config.CONFIG_VARIABLE) or None
        self._seen: tuple[int, ...] | None = None
        self._layers = started
        self.state = FileState(self._path) if self._path else None

    def layers(self) -> Loaded:
        """Return file, environment and defaults; a file that cannot be used leaves the last good ones."""
        if self._path is None or (now := stamp(Path(self._path))) == self._seen:
            return self._layers
        self._seen = now
        try:
            loaded = config.load(self._path)
        except config.ConfigError as error:
            self.state = FileState(self._path, good=False, error=str(error))
            logger.error("sluice: %s cannot be used, so the last good state stays: %s", self._path, error)
            kept = self._journal.read().layers  # another API server may have read the file more lately
            if kept is not None:
                settings = config.Config.model_validate_json(json.dumps(kept["config"]))
                self._layers = Loaded(settings, kept["origins"])
            return self._layers
        needed = state.restart_needed(self._started.config, loaded.config)
        if needed:
            logger.warning("sluice: %s changes %s, which takes a restart of the server", self._path, ", ".join(needed))
        self._layers = loaded
        self.state = FileState(self._path, restart_needed=tuple(needed))
        return loaded
