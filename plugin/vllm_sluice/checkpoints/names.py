"""Names of gate tensors and of their declaration, for the server and for the command line (no torch needed)."""

from __future__ import annotations

import re

MODULE = "output_gate"
DECLARATION = "sluice_gate"
"""Key of a checkpoint's config.json that declares gates: `{"granularity": "head" | "element"}`."""

GATE_TENSOR = re.compile(rf"(?P<block>.+)\.{MODULE}\.(?P<part>weight|bias)")
"""Full name of a gate tensor: path of the attention block, and weight or bias."""
