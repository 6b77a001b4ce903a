"""A decode worker: `python -m decode_worker --router HOST:PORT [--config FILE]`."""

import sys

from decode_worker.run import run
from tandem.worker.main import parse_arguments

if __name__ == "__main__":
    sys.exit(run(*parse_arguments(__doc__)))
