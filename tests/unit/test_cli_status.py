"""`tandem status`: what it shows of a service, and what its exit code says."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from command_line import on_a_new_terminal, one_line, tandem
from own_loop import serving_by
from scripted_router import ScriptedRouter, serving

from tandem import rpc
from tandem.cli.console import ready_line
from tandem.client.status import status_from_wire
from tandem.types import Role
from tandem.v1 import generation_pb2, registry_pb2
from tandem.wire import roles_to_wire


@pytest.fixture
def router() -> Iterator[ScriptedRouter]:
    with serving(ScriptedRouter()) as started:
        yield started


def worker_of(role: Role, **integrity: Any) -> generation_pb2.WorkerStatus:
    return generation_pb2.WorkerStatus(
        hello=registry_pb2.Hello(
            worker_id=f"{role}-1",
            address="127.0.0.1:9",
            roles=roles_to_wire(frozenset([role])),
            total_blocks=10,
            device="cpu",
        ),
        load=registry_pb2.Load(free_blocks=7),
        integrity=registry_pb2.Integrity(**integrity),
    )


def status_of(live: int = 0, roles: Iterable[Role] = Role, **integrity: Any) -> generation_pb2.StatusResponse:
    """integrity: of the first worker."""
    each = [worker_of(role, **(integrity if not place else {"ok": True})) for place, role in enumerate(roles)]
    return generation_pb2.StatusResponse(
        version="1", live_requests=live, workers=each, models=[registry_pb2.ModelInfo(name="tiny")]
    )


def test_status_shows_the_pools(router: ScriptedRouter) -> None:
    router.status = status_of(ok=True)
    result = tandem("status", "--router", router.address)
    assert result.exit_code == 0
    for words in ("model tiny", "prefill-1", "127.0.0.1:9", "7/10"):
        assert words in result.stdout


def test_status_keeps_a_row_on_one_line_where_nobody_knows_the_width(router: ScriptedRouter) -> None:
    router.status = status_of(ok=True)
    lines = on_a_new_terminal("status", "--router", router.address)
    assert len(lines) == 2 + len(Role), "the service, the table's head, a row for each worker"
    for role, line in zip(sorted(Role), lines[2:], strict=True):
        assert line.startswith(f"{role}-1")
        assert line.rstrip().endswith("ms ago")


def test_status_says_which_worker_of_a_request_is_gone(router: ScriptedRouter) -> None:
    router.status = status_of(live=2)
    for name, prefill in (("one", "prefill-1"), ("two", "prefill-0")):
        router.status.requests.add(request_id=name, phase="decode_started", prefill_worker=prefill, age_ms=1000)
    shown = tandem("status", "--router", router.address).stdout
    assert "one  decode_started, 1.0 s old, prefill-1 → -" in shown
    assert "two  decode_started, 1.0 s old, prefill-0 (gone) → -" in shown


def test_status_without_workers(router: ScriptedRouter) -> None:
    assert "no worker is ready" in tandem("status", "--router", router.address).stdout


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (status_of(ok=True), 0),
        (status_of(ok=False, problem="block 3 is lost"), 1),
        (status_of(ok=True, referenced_blocks=2), 1),
        (status_of(ok=True, reservations=1), 1),
        (status_of(live=1, ok=True, referenced_blocks=2, reservations=1), 0),
        (status_of(roles=[Role.PREFILL], ok=True), 1),
        (status_of(roles=[]), 1),
    ],
)
def test_integrity_decides_the_exit_code(router: ScriptedRouter, status: Any, code: int) -> None:
    router.status = status
    result = tandem("status", "--integrity", "--router", router.address)
    assert result.exit_code == code
    assert bool(result.stderr) == bool(code)


def test_a_pool_that_is_missing_is_named(router: ScriptedRouter) -> None:
    router.status = status_of(roles=[Role.PREFILL], ok=True)
    result = tandem("status", "--integrity", "--router", router.address)
    assert one_line(result) == "tandem: no decode worker is ready: nothing can be served"


def test_status_as_json(router: ScriptedRouter) -> None:
    router.status = status_of(ok=True, referenced_blocks=2)
    result = tandem("status", "--json", "--integrity", "--router", router.address)
    found = json.loads(result.stdout)
    assert found["workers"][0]["roles"] == ["prefill"]
    assert found["problems"] == ["prefill-1: 2 referenced blocks held, though no request is live"]


def test_a_port_that_speaks_http_is_said_so() -> None:
    """Tandem's own HTTP door is one port above the router's."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"127.0.0.1:{server.server_port}"
        try:
            result = tandem("status", "--router", address)
        finally:
            server.shutdown()
            thread.join(10)
    assert result.exit_code == 1
    said = f"tandem: what answers at {address} does not speak gRPC; is this its HTTP port, or not a Tandem router?"
    assert one_line(result) == said


def test_one_that_says_nothing_is_not_taken_for_another() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        result = tandem("status", "--router", address)
    assert result.exit_code == 1
    assert one_line(result).startswith(f"tandem: cannot reach a Tandem router at {address}: ")


def test_a_grpc_port_of_somebody_else_is_said_so() -> None:
    async def serve(started: threading.Event, stop: asyncio.Event) -> None:
        nonlocal address
        server = rpc.make_server()
        address = f"127.0.0.1:{rpc.bind(server, '127.0.0.1', 0)}"
        await server.start()
        started.set()
        await stop.wait()
        await server.stop(0)

    address = ""
    with serving_by(serve):
        result = tandem("status", "--router", address)
    assert result.exit_code == 1
    assert one_line(result).startswith(f"tandem: what answers at {address} is not a Tandem router")


def test_the_ready_line_names_address_model_and_pools() -> None:
    line = ready_line("127.0.0.1:8700", status_from_wire(status_of()))
    assert line == "ready at 127.0.0.1:8700: model tiny, 1 prefill + 1 decode"
    with_door = status_of()
    with_door.http_port = 8701
    line = ready_line("[::1]:8700", status_from_wire(with_door))
    assert line == "ready at [::1]:8700: model tiny, 1 prefill + 1 decode; OpenAI API at http://[::1]:8701/v1"
