"""What a benchmark found, as a file: when, by which command, on what machine."""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path


def write(path: Path | None, **found: object) -> None:
    """Nothing without a path."""
    if path is None:
        return
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {platform.platform()}",
    }
    path.write_text(json.dumps({**facts, **found}, indent=1) + "\n")
