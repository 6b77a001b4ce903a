"""A prefill worker: `python -m prefill_worker --router HOST:PORT [--config FILE]`."""

import sys

from tandem.entry import starting

if __name__ == "__main__":
    with starting():
        from tandem.worker.arguments import parse_arguments
    arguments = parse_arguments("python -m prefill_worker", "A prefill worker.")
    with starting():  # torch: seconds
        from prefill_worker.run import run
    sys.exit(run(*arguments))
