"""A decode worker: `python -m decode_worker --router HOST:PORT [--config FILE]`."""

import sys

from tandem.entry import starting

if __name__ == "__main__":
    with starting():
        from tandem.worker.arguments import parse_arguments
    arguments = parse_arguments("python -m decode_worker", "A decode worker.")
    with starting():  # torch: seconds
        from decode_worker.run import run
    sys.exit(run(*arguments))
