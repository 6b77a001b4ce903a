"""A process without a free file descriptor still says so, and a port is watched again once there are some."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest
from scripted_worker import eventually

from tandem.process import descriptors

LEFT = 40


@contextmanager
def few_descriptors() -> Iterator[None]:
    """This process may have no descriptor that is so far above the lowest free one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = descriptors.lowest_free() + LEFT
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def all_taken() -> Iterator[None]:
    taken: list[int] = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        assert taken
        with pytest.raises(OSError, match="Too many open files"):
            os.dup(taken[0])
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)


async def test_the_watch_outlives_the_last_descriptor(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(descriptors, "WATCH_S", 0.01)
    monkeypatch.setattr(descriptors, "WARN_EVERY_S", 0.0)
    caplog.set_level(logging.WARNING)
    with ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = listening.getsockname()[1]
        stack.enter_context(few_descriptors())
        monkeypatch.setattr(descriptors, "most_connections", lambda: 3)
        watch = asyncio.create_task(descriptors.watch_connections(port, "the port"))
        with all_taken():
            await eventually(lambda: "the port: its connections cannot be counted: Too many open files" in caplog.text)
        caplog.clear()
        for _ in range(3):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            stack.enter_context(listening.accept()[0])
        await eventually(lambda: "the port has 3 connections" in caplog.text)
        watch.cancel()


@pytest.mark.parametrize(("wanted", "most"), [(100, 96), (90, 90)])
def test_a_port_has_as_many_connections_as_it_wants_or_three_eighths_of_the_descriptors(
    monkeypatch: pytest.MonkeyPatch, wanted: int, most: int
) -> None:
    monkeypatch.setattr(descriptors, "descriptor_limit", lambda: 256)
    assert descriptors.most_connections(wanted) == most
