"""What every test can rely on, however pytest was started."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

# A non-interactive shell starts its background jobs (`pytest &` in a script) with SIGINT ignored, and children inherit
# that: Ctrl-C in a test would reach nobody. A handler does not survive exec, so children begin with the default.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# A busy machine is slow, and says nothing about the code.
settings.register_profile("tandem", deadline=None)
settings.load_profile("tandem")


@pytest.fixture(scope="session")
def nixl() -> None:
    """Skips where the optional NIXL is not installed."""
    pytest.importorskip("nixl_cu12._bindings", reason="NIXL is not installed: see the extra [nixl]")


@pytest.fixture
def by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every KV copy is made by a thread, as large ones are: a test may hold it up, and the event loop goes on."""
    monkeypatch.setattr("kv_transfer.frames.cells.QUICK_BYTES", 0)


@pytest.fixture(scope="session")
def ray_node() -> Iterator[str]:
    """Its address. This process is part of a private Ray cluster of one node until the last test is over."""
    from ray_head import joined, ray_head

    # A store that is full stays so.
    with ray_head(spills=False) as head, joined(head.address, head.token):
        yield head.address
