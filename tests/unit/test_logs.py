"""The request id on every line."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Iterator

import pytest

from tandem import logs


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    root, stream = logging.getLogger(), io.StringIO()
    level = root.level
    monkeypatch.setattr(root, "handlers", [])
    logs.configure(stream=stream)
    yield stream
    root.setLevel(level)


async def test_a_line_names_the_request_of_its_task_or_its_own(stream: io.StringIO) -> None:
    log = logging.getLogger("some.room")

    async def handle(request_id: str) -> None:
        logs.about(request_id)
        await asyncio.sleep(0)
        log.info("handled")

    await asyncio.gather(handle("r1"), handle("r2"))
    log.info("of nobody")
    logs.of_request("some.room", "r3").warning("by itself")
    log.info("with an extra", extra={"request_id": "r4"})
    ends = [line.split("some.room ")[1] for line in stream.getvalue().splitlines()]
    assert ends == ["[r1] handled", "[r2] handled", "[-] of nobody", "[r3] by itself", "[r4] with an extra"]
