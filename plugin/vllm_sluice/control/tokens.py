"""The admin tokens: who may change the run-time state."""

from __future__ import annotations

import hmac
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

from vllm_sluice.config import TOKEN_VARIABLE, ConfigError

logger = logging.getLogger("vllm.sluice.control")

_LEAST_LENGTH = 16
_LINE = re.compile(r"\s*([A-Za-z0-9_.-]{1,64})\s*:\s*(\S+)\s*")


class Tokens:
    """Named bearer tokens, compared in constant time."""

    def __init__(self, by_name: Mapping[str, str]) -> None:
        self._by_name = dict(by_name)

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self._by_name)

    def name(self, token: str) -> str | None:
        """Return the name of a token, or None; looks at all tokens, whichever matches."""
        found = None
        for name, known in self._by_name.items():
            if hmac.compare_digest(known.encode(), token.encode()):
                found = name
        return found


def read_tokens(file: str | None, environ: Mapping[str, str] | None = None) -> Tokens:
    """Read the token of `SLUICE_ADMIN_TOKEN`, called `admin`, and those of a file.

    Raises
    ------
    ConfigError
        If the file cannot be read, a line is not `NAME: TOKEN`, a name comes twice or a token is short.
    """
    environ = os.environ if environ is None else environ
    found: dict[str, str] = {}
    if token := environ.get(TOKEN_VARIABLE, "").strip():
        found["admin"] = _long_enough(token, TOKEN_VARIABLE)
    if file is None:
        return Tokens(found)
    path = Path(file)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"control.token_file: cannot read {file}: {error}") from None
    if path.stat().st_mode & 0o004:
        logger.warning("sluice: everybody on this machine may read the admin tokens in %s; chmod 600 it", file)
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ConfigError(f"control.token_file: line {number} of {file} is not NAME: TOKEN")
        name, token = match.groups()
        if name in found:
            raise ConfigError(f"control.token_file: line {number} of {file}: a second token named {name!r}")
        found[name] = _long_enough(token, f"line {number} of {file}")
    return Tokens(found)


def _long_enough(token: str, where: str) -> str:
    if len(token) < _LEAST_LENGTH:
        raise ConfigError(
            f"{where}: an admin token of {len(token)} characters can be guessed; use {_LEAST_LENGTH} or more, "
            "such as those of: openssl rand -hex 24"
        )
    return token
