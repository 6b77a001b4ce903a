"""The committed stubs are what the protos give: a proto cannot change without them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_regenerated_stubs_are_the_committed_ones(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "gen_proto.py", "--output", tmp_path], check=True, timeout=60, cwd=ROOT
    )
    committed, fresh = ROOT / "tandem" / "v1", tmp_path / "tandem" / "v1"
    names = {path.name for path in committed.iterdir() if "_pb2" in path.name}
    assert names == {path.name for path in fresh.iterdir()}
    changed = [name for name in sorted(names) if (committed / name).read_bytes() != (fresh / name).read_bytes()]
    assert changed == [], "run scripts/gen_proto.py and commit what it writes"
