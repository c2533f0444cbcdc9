"""What a panel needs beyond the defaults, and what it says where that is missing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Need:
    """A condition for data.

    Attributes
    ----------
    text
        Sentence for the panel's description.
    no_value
        What the panel shows instead of "No data".
    """

    text: str
    no_value: str


IDLE = Need("", "no data: no traffic in the window, or no server")
SERVER = Need("", "no server reports")
PATCH = Need("Needs an installed patch.", "no data: no patch is installed, or no server")
FULL = Need("Needs `telemetry.detail: full`.", "no data: needs telemetry.detail: full, and traffic")
GATE = Need("Needs an installed gate.", "no data: no gate is installed, or no traffic")
BASELINE = Need(
    "Needs a baseline for the patch state and parameters in force (`sluice baseline record`).",
    "no data: no baseline for this patch state and its parameters",
)
QUANTIZATION = Need("Needs the `quantization` probe.", "no data: quantization probe is off, or no traffic")
STATIC = Need(
    "Needs the `quantization` probe and a baseline, whose scales are meant.",
    "no data: needs the quantization probe and a baseline",
)
BASELINE_FILE = Need("Needs `telemetry.baseline`.", "no baseline file is named")
CONFIG_FILE = Need("Needs a configuration file.", "no configuration file")
CHANGED = Need("Needs a change of a patch in the time range.", "no data: no patch was changed in this time range")
FULL_GATE = Need(
    "Needs an installed gate and `telemetry.detail: full`.",
    "no data: needs telemetry.detail: full and an installed gate, and traffic",
)
