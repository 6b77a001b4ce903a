"""`tandem demo`: the whole idea in a few seconds. `make demo` runs it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from tandem.cli.console import make_console, printable, reported
from tandem.cli.tables import timeline_table, transfer_line
from tandem.client import AsyncClient, ServiceStatus
from tandem.config import TandemConfig, load_config
from tandem.errors import InternalError
from tandem.launch.processes import Supervisor
from tandem.process.standard_streams import never_block
from tandem.types import ChoiceFinished, Completed, Delta

PROMPT, EXPECTED = "The color of dog", " can vary widely"
# Releases on the far side may still be in the air when the last token has arrived.
SETTLE_S = 10.0
INDENT = "  "


def demo() -> None:
    """Start a router, a prefill and a decode worker; ask one question; show where the time and the bytes went."""
    never_block()
    console = make_console()
    with reported():
        # Small enough for any laptop; any free ports, so that a service that runs already is not disturbed.
        config = load_config(
            overrides={
                "router": {"port": 0, "http_port": -1, "drain_timeout_s": 2.0},
                "engine": {"kv_memory_mib": 64},
                "worker": {"drain_timeout_s": 2.0},
            }
        )
        asyncio.run(_demo(console, config))


async def _demo(console: Console, config: TandemConfig) -> None:
    console.print(
        "\n[bold]Tandem[/bold]: prefill on one worker, decode on another, their KV cache handed over in between.\n"
    )
    started_s = time.monotonic()
    supervisor = Supervisor(config, output=None)
    try:
        with _waiting(console, "starting a router, a prefill worker and a decode worker …"):
            status = await supervisor.start()
        _show_processes(console, supervisor, status, time.monotonic() - started_s)
        async with AsyncClient(supervisor.address, timeout_s=60) as client:
            text = await _ask(console, client)
            await _show_integrity(console, client)
    finally:
        pids = supervisor.pids()
        await supervisor.stop()
    console.print(f"{INDENT}[green]✓[/green] stopped: all {len(pids)} processes are gone\n")
    if text != EXPECTED:
        raise InternalError(f"the answer is {text!r}, and should have been {EXPECTED!r}")


@contextmanager
def _waiting(console: Console, words: str) -> Iterator[None]:
    """A spinner on a terminal, one line elsewhere."""
    if console.is_terminal:
        with console.status(words):
            yield
    else:
        console.print(INDENT + words)
        yield


def _show_processes(console: Console, supervisor: Supervisor, status: ServiceStatus, took_s: float) -> None:
    table = Table(box=None, padding=(0, 2, 0, 2), show_header=False)
    pids = supervisor.pids()
    table.add_row("router", supervisor.address, f"pid {pids['router']}", "admits, places, streams")
    for name, pid in pids.items():
        for worker in status.workers:
            if worker.pid == pid:
                what = f"{worker.worker_id}: {worker.total_blocks} KV blocks on {worker.device}"
                table.add_row(name, worker.address, f"pid {pid}", what)
    console.print(table)
    models = ", ".join(model.name for model in status.models)
    console.print(f"{INDENT}[green]✓[/green] ready in {took_s:.1f} s, model {models}\n")


async def _ask(console: Console, client: AsyncClient) -> str:
    """Streams the answer and says where the time and the bytes went; returns the answer's text."""
    console.print(f"{INDENT}[dim]prompt[/dim]  {PROMPT}")
    console.print(f"{INDENT}[dim]answer[/dim] ", end="")
    text = ""
    async for event in client.generate(PROMPT, max_tokens=32):
        match event:
            case Delta():
                text += event.text
                console.print(printable(event.text), end="", style="bold", markup=False, soft_wrap=True)
            case ChoiceFinished():
                console.print("\n")
                console.print(
                    Padding(timeline_table(event.report, event.output_tokens), (0, 0, 0, len(INDENT)), expand=False)
                )
                console.print(f"\n{INDENT}{transfer_line(event.report)}", markup=False)
            case Completed():
                usage = event.usage
                console.print(f"{INDENT}{usage.prompt_tokens} prompt tokens in, {usage.output_tokens} tokens out")
    return text


async def _show_integrity(console: Console, client: AsyncClient) -> None:
    """Raises InternalError when a worker still holds something for nobody."""
    give_up_s = time.monotonic() + SETTLE_S
    while True:
        status = await client.status(check_integrity=True)
        problems = status.problems()
        if not problems and not status.live_requests:
            break
        if time.monotonic() > give_up_s:
            raise InternalError("; ".join(problems) or f"{status.live_requests} requests are still live")
        await asyncio.sleep(0.05)
    console.print(f"{INDENT}[green]✓[/green] no orphan: 0 blocks referenced, 0 reservations, on every worker")
