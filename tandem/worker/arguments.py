"""The command line of `python -m prefill_worker` and `python -m decode_worker`. No torch: --help is quick."""

from __future__ import annotations

import argparse
from pathlib import Path

from tandem.addresses import dialable
from tandem.config import TandemConfig, load_config
from tandem.engine.backends.cuda.gpus import take_gpu
from tandem.errors import TandemError


def parse_arguments(command: str, description: str, arguments: list[str] | None = None) -> tuple[TandemConfig, str]:
    """Configuration and router. Exits with 2, and one line, when they are wrong."""
    parser = argparse.ArgumentParser(prog=command, description=description)
    parser.add_argument("--router", required=True, type=_address, metavar="HOST:PORT", help="the router to join")
    parser.add_argument("--config", type=Path, help="YAML file with sections model, engine, worker")
    parser.add_argument("--model", help="directory or hub id")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default: any free one)")
    parser.add_argument("--advertise", type=_address, metavar="HOST:PORT", help="how others reach this worker")
    given = parser.parse_args(arguments)
    overrides = {
        "model": {"path": given.model},
        "engine": {"device": given.device},
        "worker": {"host": given.host, "port": given.port, "advertise": given.advertise},
    }
    try:
        config = load_config(given.config, overrides)
        take_gpu(config.engine)
        return config, given.router
    except TandemError as error:
        parser.exit(2, f"error: {error.message}\n")


def _address(value: str) -> str:
    try:
        return dialable(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
