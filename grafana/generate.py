#!/usr/bin/env python3
"""Write grafana/dashboards/<uid>.json from the code in grafana/src; with --check only say whether they are current."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "src"))

from sluice_boards import attention, fleet, layers, monitor, overview, patches, quantization  # noqa: E402

BOARDS = (overview, layers, attention, quantization, patches, monitor, fleet)


def boards() -> dict[str, dict[str, Any]]:
    """Return every board by its uid."""
    return {built["uid"]: built for built in (module.build() for module in BOARDS)}


def main() -> int:
    """Run the command line; 1 if --check found a file that is not current."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    folder = HERE / "dashboards"
    wanted = {f"{uid}.json": f"{json.dumps(built, indent=1, ensure_ascii=False)}\n" for uid, built in boards().items()}
    there = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.json")}
    changed = sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))
    if check:
        for name in changed:
            print(f"grafana/dashboards/{name} is not what grafana/src makes; run grafana/generate.py", file=sys.stderr)
        return int(bool(changed))
    folder.mkdir(exist_ok=True)
    for name in changed:
        if name in wanted:
            (folder / name).write_text(wanted[name], encoding="utf-8")
        else:
            (folder / name).unlink()
    print(f"{len(wanted)} boards, {len(changed)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
