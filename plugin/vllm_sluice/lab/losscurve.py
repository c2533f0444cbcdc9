"""The loss curve of a training run as a small SVG picture."""

from __future__ import annotations

import json
from pathlib import Path

_WIDTH, _HEIGHT, _MARGIN = 720, 360, 48


def write_loss_curve(log: Path, picture: Path) -> None:
    """Draw training loss (thin) and held-out loss (dots) over steps from a `log.jsonl` into an SVG file."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    train = [(r["step"], r["train_loss"]) for r in records]
    held_out = [(r["step"], r["loss"]) for r in records if "loss" in r]
    if not train:
        return
    last = max(step for step, _ in train)
    values = [loss for _, loss in train + held_out]
    low, high = min(values), max(values)
    span = max(high - low, 1e-9)

    def place(point: tuple[int, float]) -> str:
        x = _MARGIN + point[0] / last * (_WIDTH - 2 * _MARGIN)
        y = _HEIGHT - _MARGIN - (point[1] - low) / span * (_HEIGHT - 2 * _MARGIN)
        return f"{x:.1f},{y:.1f}"

    dots = []
    for point in held_out:
        x, y = place(point).split(",")
        dots.append(f'<circle cx="{x}" cy="{y}" r="2.5" fill="#c0392b"/>')
    labels = [
        f'<text x="{_MARGIN}" y="{_HEIGHT - 14}">step 0</text>',
        f'<text x="{_WIDTH - _MARGIN}" y="{_HEIGHT - 14}" text-anchor="end">step {last}</text>',
        f'<text x="{_MARGIN - 6}" y="{_MARGIN}" text-anchor="end">{high:.2f}</text>',
        f'<text x="{_MARGIN - 6}" y="{_HEIGHT - _MARGIN}" text-anchor="end">{low:.2f}</text>',
        f'<text x="{_MARGIN}" y="20">loss in nats: training (line), held out (dots)</text>',
    ]
    picture.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
        f'<polyline fill="none" stroke="#2c3e50" points="{" ".join(place(p) for p in train)}"/>'
        f"{''.join(dots)}{''.join(labels)}</svg>\n"
    )
