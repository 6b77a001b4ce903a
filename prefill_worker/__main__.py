"""A prefill worker: `python -m prefill_worker --router HOST:PORT [--config FILE]`."""

from tandem.process.entry import end_process, starting
from tandem.process.standard_streams import never_block

if __name__ == "__main__":
    never_block()
    with starting():
        from tandem.types import Role
        from tandem.worker.arguments import parse_arguments
    arguments = parse_arguments("python -m prefill_worker", "A prefill worker.")
    with starting():  # torch: seconds
        from prefill_worker.service import PrefillService
        from tandem.worker.main import WorkerKind, run_worker
    end_process(run_worker(WorkerKind(frozenset({Role.PREFILL}), {Role.PREFILL: PrefillService}), *arguments))
