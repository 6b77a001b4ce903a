"""File descriptors: how many this process may have, and what connections may take of them."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import socket
import time
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

# More would be of no use to a process, and where the limit is larger by far some libraries walk through all of it.
MOST_DESCRIPTORS = 1 << 20
# One wake-up of the event loop takes them all.
MOST_BACKLOG = 128
# A gRPC connection carries many requests; one that asks nothing takes about 20 KiB.
GRPC_CONNECTIONS = 4096
WATCH_S = 1.0
WARN_EVERY_S = 60.0


def raise_limit() -> None:
    """Lets this process open as many descriptors as its hard limit says."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:  # the limit of a container, which it does not tell
        log.warning("this process may have %d file descriptors, and cannot have %d: %s", soft, wanted, error)


def descriptor_limit() -> int:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def most_connections(wanted: int = GRPC_CONNECTIONS) -> int:
    """Connections that a port may have at once: as many as wanted, or three eighths of the descriptors.

    So a router's two ports leave a quarter to files, to links with workers, and to connections that are being taken in
    or turned away; a worker may have as many connections to its peers as they have to it.
    """
    return min(wanted, descriptor_limit() * 3 // 8)


def backlog() -> int:
    """Connections that the kernel takes in before we do, of a listening socket: there are descriptors for them all."""
    return max(8, min(MOST_BACKLOG, descriptor_limit() // 16))


class RateLimitedWarning:
    """A warning that comes once a minute, however often there is a reason."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._next_s = 0.0
        self._unsaid = 0

    def warn(self, message: str, *arguments: object) -> None:
        now_s = time.monotonic()
        if now_s < self._next_s:
            self._unsaid += 1
            return
        more = f" ({self._unsaid} more times in the last minute)" if self._unsaid else ""
        self._logger.warning(message + more, *arguments)
        self._next_s, self._unsaid = now_s + WARN_EVERY_S, 0


async def watch_connections(port: int, whose: str) -> None:
    """Warns while a port has as many connections as it takes: gRPC turns the next ones away without a word.

    whose: of the port, for the warning. Runs until it is cancelled.
    """
    warning, limit = RateLimitedWarning(log), most_connections()
    while True:
        await asyncio.sleep(WATCH_S)
        try:
            # The lowest free descriptor is hardly above the number of those in use: to see it costs nothing.
            if lowest_free() < limit:
                continue
            count = await asyncio.to_thread(connections_of, port)
        except OSError as error:  # to count them takes a descriptor
            warning.warn("%s: its connections cannot be counted: %s", whose, error.strerror)
            continue
        if count >= limit:
            warning.warn("%s has %d connections, the most it takes: further ones are closed at once", whose, count)


def lowest_free() -> int:
    """The descriptor that the next file of this process gets."""
    descriptor = os.open(os.devnull, os.O_RDONLY)
    os.close(descriptor)
    return descriptor


def connections_of(port: int) -> int:
    """This process's connections with this port at our end."""
    return sum(_is_connection(int(name), port) for name in os.listdir("/proc/self/fd"))


def _is_connection(descriptor: int, port: int) -> bool:
    try:
        looked_at = socket.socket(fileno=descriptor)
    except OSError:  # a file, or closed meanwhile
        return False
    try:
        looked_at.getpeername()
        return bool(looked_at.getsockname()[1] == port)
    except (OSError, IndexError):  # it listens, or is of another family
        return False
    finally:
        looked_at.detach()


def tell_exhaustion_rarely(loop: asyncio.AbstractEventLoop) -> None:
    """asyncio tells of each accept() that finds no descriptor, with a traceback; from now on one warning a minute."""
    warning, usual = RateLimitedWarning(log), loop.get_exception_handler()

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            warning.warn("no file descriptor is free for a connection that waits: %s", error.strerror)
        else:
            tell(loop, context)

    def by_default(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        loop.default_exception_handler(context)

    tell: Callable[[asyncio.AbstractEventLoop, dict[str, Any]], object] = usual or by_default
    loop.set_exception_handler(handle)
