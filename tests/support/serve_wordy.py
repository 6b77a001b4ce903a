"""`python serve_wordy.py serve ...`: the command line as it is, whose workers are wordy_worker.py."""

from __future__ import annotations

from functools import partial

from supervised import ENVIRONMENT

from tandem.cli import serve
from tandem.cli.main import main
from tandem.launch.processes import Supervisor

if __name__ == "__main__":
    serve.Supervisor = partial(Supervisor, environment=ENVIRONMENT, worker_module="wordy_worker")  # type: ignore[misc,assignment]
    main()
