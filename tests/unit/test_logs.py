"""The request id on every line."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Callable, Iterator

import pytest

from tandem.process import logs

Configure = Callable[..., io.StringIO]


@pytest.fixture
def configure(monkeypatch: pytest.MonkeyPatch) -> Iterator[Configure]:
    """As logs.configure; returns where the lines go."""
    root, level = logging.getLogger(), logging.getLogger().level

    def fresh(*settings: str) -> io.StringIO:
        stream = io.StringIO()
        monkeypatch.setattr(root, "handlers", [])  # not before the test runs: pytest's own come with it
        logs.configure(*settings, stream=stream)
        return stream

    yield fresh
    root.setLevel(level)
    for name in logs.OURS:
        logging.getLogger(name).setLevel(logging.NOTSET)


async def test_a_line_names_the_request_of_its_task_or_its_own(configure: Configure) -> None:
    stream = configure()
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


def test_nothing_that_a_client_says_begins_a_line_or_moves_a_cursor(configure: Configure) -> None:
    stream = configure()
    log = logging.getLogger("some.room")
    forged = "x\n2026-01-01 00:00:00,000 ERROR router [-] all is lost\r\x1b[2J\x85\u2028end"
    log.info("the tag is %s", forged)
    log.info("ended", extra={"fields": {"tag": forged, "model": "two words", "tokens": 3}})
    try:
        raise ValueError(forged)
    except ValueError:
        log.exception("a bug")
    lines = stream.getvalue().splitlines()
    assert [
        line for line in lines if " all is lost" in line and not line.startswith(" ") and "x\\n2026" not in line
    ] == []
    assert lines[1].endswith(' model="two words" tokens=3')
    assert len([line for line in lines if not line.startswith("    ")]) == 3
    assert not {char for char in stream.getvalue() if char < " " or "\x7f" <= char <= "\x9f"} - {"\n"}


def test_json_is_one_object_a_line_whatever_is_said(configure: Configure) -> None:
    stream = configure("debug", "json")
    log = logging.getLogger("router.some")
    log.debug("a\nb \u2028 \udc80", extra={"request_id": "r1", "fields": {"model": "m", "output_tokens": 3}})
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("a bug")
    logging.getLogger("some.library").debug("not ours")
    one, two = map(json.loads, stream.getvalue().splitlines())
    assert (one["message"], one["level"], one["request_id"]) == ("a\nb \u2028 \udc80", "debug", "r1")
    assert (one["logger"], one["model"], one["output_tokens"]) == ("router.some", "m", 3)
    assert two["request_id"] is None
    assert two["exception"].endswith("ValueError: two\nlines")
    for line in (stream.getvalue().splitlines()[0], "plain \x1b[1m text", "[1]", "{}"):
        relayed = json.loads(logs.relayed("decode-0", line))
        assert (relayed["process"], "message" in relayed) == ("decode-0", line != "{}")


@pytest.mark.parametrize(("level", "said"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_levels(configure: Configure, level: str, said: int) -> None:
    stream = configure(level)
    log = logging.getLogger("kv_transfer.some")
    for each in (log.debug, log.info, log.warning, log.error):
        each("said")
    assert stream.getvalue().count("said") == said
