"""The error of the command line."""

from __future__ import annotations


class Problem(Exception):
    """A reason to stop that the person at the console can act on: what was asked, what was found, what to do."""
