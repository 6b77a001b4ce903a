"""`python -m router`: the router as a process."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tandem.process.entry import keep_torch_out, starting
from tandem.process.standard_streams import never_block


def main(arguments: list[str] | None = None) -> int:
    never_block()
    parser = argparse.ArgumentParser(prog="python -m router", description="The router as a process.")
    parser.add_argument("--config", type=Path, help="YAML file; tandem/config.py lists its keys")
    parser.add_argument("--host", help="address to listen on; overrides router.host")
    parser.add_argument("--port", type=int, help="port to listen on, 0 for any free one; overrides router.port")
    parser.add_argument("--http-port", type=int, help="of the HTTP door, 0: any, -1: none; overrides router.http_port")
    parser.add_argument("--model", help="directory or hub id of the served model; overrides model.path")
    options = parser.parse_args(arguments)
    keep_torch_out()
    with starting():
        from router.app import run
        from tandem.config import load_config
        from tandem.errors import ConfigError
        from tandem.process import logs
    try:
        router = {"host": options.host, "port": options.port, "http_port": options.http_port}
        config = load_config(options.config, {"router": router, "model": {"path": options.model}})
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    logs.configure(config.log.level, config.log.format)
    return run(config)


if __name__ == "__main__":
    sys.exit(main())
