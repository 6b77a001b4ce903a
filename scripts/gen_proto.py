"""Generates tandem/v1/*_pb2*.py from proto/: `python scripts/gen_proto.py [--output DIR]`.

Uses the oldest grpcio-tools that Tandem supports (pinned in pyproject.toml's dev extra), so that the lower
bounds of grpcio and protobuf there hold. tests/unit/test_stubs.py regenerates and compares bytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent


def generate(output: Path) -> None:
    """Writes stubs for every proto file below output/tandem/v1. Raises RuntimeError when protoc fails."""
    protos = sorted(str(path.relative_to(ROOT / "proto")) for path in (ROOT / "proto").rglob("*.proto"))
    flags = [f"--{kind}_out={output}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", f"-I{ROOT / 'proto'}", *flags, *protos]) != 0:
        raise RuntimeError("protoc failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT)
    generate(parser.parse_args().output)


if __name__ == "__main__":
    sys.exit(main())
