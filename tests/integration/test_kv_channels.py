"""Channels to peers: kept, bounded, closed."""

from __future__ import annotations

import pytest

from kv_transfer.ends.transport import Channels
from tandem.errors import Overloaded


async def test_a_channel_is_kept_for_reuse() -> None:
    channels = Channels(1 << 20)
    async with channels.use("127.0.0.1:1") as first, channels.use("127.0.0.1:1") as second:
        assert first is second
    async with channels.use("127.0.0.1:1") as third:
        assert third is first
    await channels.aclose()


async def test_the_longest_idle_one_makes_room() -> None:
    channels = Channels(1 << 20, most=2)
    async with channels.use("127.0.0.1:1") as first:
        async with channels.use("127.0.0.1:2") as second:
            pass
        async with channels.use("127.0.0.1:3"), channels.use("127.0.0.1:1") as kept:
            assert kept is first
    async with channels.use("127.0.0.1:2") as again:
        assert again is not second
    await channels.aclose()


async def test_one_peer_too_many_is_refused_until_one_is_idle() -> None:
    channels = Channels(1 << 20, most=1)
    async with channels.use("127.0.0.1:1"):
        with pytest.raises(Overloaded):
            async with channels.use("127.0.0.1:2"):
                pytest.fail("opened")
    async with channels.use("127.0.0.1:2"):
        pass
    await channels.aclose()
