"""`python -m wordy_worker worker --role R --router HOST:PORT ...`: a scripted worker as a process, with much to say.

For every request it prints more than a pipe holds, as Python and as a C library would. From a prompt that begins with
HELD on, nobody gets more than two tokens until SIGUSR1.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress

from scripted_worker import Cluster, ScriptedWorker

from tandem.types import Role
from tandem.v1 import registry_pb2, worker_pb2

HELD = 99
WORDS = "words " * 30
LINES = 400


class WordyWorker(ScriptedWorker):
    def hello(self) -> registry_pb2.Hello:
        hello = super().hello()
        hello.pid = os.getpid()
        return hello

    async def Reserve(self, request: worker_pb2.ReserveRequest, context: object) -> worker_pb2.Reservation:
        print("\n".join(f"{request.request.request_id} {number} {WORDS}" for number in range(LINES)), flush=True)
        with suppress(BlockingIOError):  # a C library ignores it
            os.write(2, (f"a library's {WORDS}\n" * LINES).encode())
        if request.request.prompt_ids[0] == HELD:
            self.hold("rest")
        return await super().Reserve(request, context)


async def main() -> None:
    cluster = Cluster(sys.argv[sys.argv.index("--router") + 1])
    name = f"wordy-{os.getpid()}"
    worker = cluster.workers[name] = WordyWorker(cluster, name, list(Role))
    await worker.start()
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, worker.let, "rest")
    await stopped.wait()
    await worker.kill()


if __name__ == "__main__":
    asyncio.run(main())
