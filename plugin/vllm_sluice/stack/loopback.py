"""Ports and pages on this machine."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request

from vllm_sluice.commands.problem import Problem

HOST = "127.0.0.1"


def get(url: str) -> bytes | None:
    """Return the body of a page, or None if it cannot be had."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=5) as answer:
            body: bytes = answer.read()
            return body
    except (urllib.error.URLError, OSError):
        return None


def free_port(preferred: int, program: str) -> int:
    """Return this port if it is free, else another.

    Raises
    ------
    Problem
        If the machine has none.
    """
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise Problem(f"no free port found for {program}")
