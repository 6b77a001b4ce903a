"""Figures against numbers worked out by hand, the server-sent events, and vLLM's own keys."""

from __future__ import annotations

import pytest
from rich.console import Console

from loadtest.metrics import Outcome, details, summarize
from loadtest.report import report
from loadtest.targets.sse import MAX_EVENT_BYTES, EventSplitter, Malformed


def answered(scheduled: float, sent: float, *arrivals: float, prompt: int = 10, tokens: int | None = None) -> Outcome:
    return Outcome(scheduled, prompt, sent, list(arrivals), tokens)


def failed(kind: str) -> Outcome:
    outcome = Outcome(0.0, 10, 0.0)
    outcome.set_failure(kind, "words")
    return outcome


# TTFT 0.1, gaps 0.02 0.04, E2EL 0.16, TPOT 0.03; due 0.5 s before it was sent.
LATE = answered(0.5, 1.0, 1.1, 1.12, 1.16, tokens=3)
# TTFT 0.3, gaps 0.1, E2EL 0.4; five tokens in two arrivals: TPOT 0.1 / 4.
BUNDLED = answered(2.0, 2.0, 2.3, 2.4, prompt=30, tokens=5)
# One token: TTFT = E2EL = 0.2, no TPOT.
SINGLE = answered(3.0, 3.0, 3.2, tokens=1)
ALL = [LATE, BUNDLED, SINGLE, failed("overloaded"), failed("overloaded"), failed("http_500")]


def test_counts_and_throughput() -> None:
    found = summarize(ALL, 4.0, (), {})
    assert (found["offered"], found["completed"], found["failed"]) == (6, 3, 3)
    assert found["failures"] == {"overloaded": 2, "http_500": 1}
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (50, 9)
    assert found["request_throughput"] == 0.75
    assert found["output_throughput"] == 2.25
    assert found["total_token_throughput"] == 14.75
    assert found["request_goodput"] is None
    assert found["attainment"] is None


def test_latencies_from_sending() -> None:
    found = summarize(ALL, 4.0, (50, 99, 99.9), {})
    assert found["mean_ttft_ms"] == pytest.approx(200)
    assert found["std_ttft_ms"] == pytest.approx((2 * 100**2 / 3) ** 0.5)
    assert found["p50_ttft_ms"] == found["median_ttft_ms"] == pytest.approx(200)
    assert found["p99_ttft_ms"] == pytest.approx(200 + 0.98 * 100)  # between the second and the third of three
    assert found["p99.9_ttft_ms"] == pytest.approx(200 + 0.998 * 100)
    assert found["mean_tpot_ms"] == pytest.approx((30 + 25) / 2)
    assert found["mean_itl_ms"] == pytest.approx((20 + 40 + 100) / 3)
    assert found["median_itl_ms"] == pytest.approx(40)
    assert found["mean_e2el_ms"] == pytest.approx((160 + 400 + 200) / 3)
    assert found["mean_client_queue_time_ms"] == pytest.approx(500 / 3)


def test_latencies_from_the_schedule() -> None:
    found = summarize(ALL, 4.0, (), {})["from_schedule"]
    assert found["mean_ttft_ms"] == pytest.approx((600 + 300 + 200) / 3)
    assert found["mean_e2el_ms"] == pytest.approx((660 + 400 + 200) / 3)


@pytest.mark.parametrize(
    ("goodput", "good", "good_from_schedule"),
    [
        ({"ttft": 250}, 2, 1),
        ({"tpot": 26}, 2, 2),  # an answer of one token counts as 0
        ({"tpot": 24}, 1, 1),
        ({"e2el": 200.001}, 2, 1),
        ({"ttft": 1000, "tpot": 1000, "e2el": 1000}, 3, 3),
        ({"ttft": 250, "tpot": 26}, 1, 1),
    ],
)
def test_goodput_and_attainment(goodput: dict[str, float], good: int, good_from_schedule: int) -> None:
    """Attainment is over all six that were offered: the failed ones too."""
    found = summarize(ALL, 4.0, (), goodput)  # type: ignore[arg-type]
    assert found["request_goodput"] == good / 4
    assert found["attainment"] == pytest.approx(good / 6)
    assert found["from_schedule"]["request_goodput"] == good_from_schedule / 4
    assert found["from_schedule"]["attainment"] == pytest.approx(good_from_schedule / 6)


def test_peaks_are_of_whole_seconds_from_the_first_start() -> None:
    found = summarize([answered(0, 10.0, 10.2, 10.4, 11.5), answered(0, 10.9, 10.95, 13.0)], 3.0, (), {})
    assert found["max_output_tokens_per_s"] == 3  # in the first second
    assert found["max_concurrent_requests"] == 2


def test_without_any_answer_nothing_is_measured() -> None:
    for outcomes in ([], [failed("unavailable")]):
        found = summarize(outcomes, 1.0, (99,), {"ttft": 1})
        assert {found[name] for name in found if name.endswith("_ms")} == {None}
        assert found["from_schedule"]["p99_e2el_ms"] is None
        assert found["request_throughput"] == found["request_goodput"] == 0
        assert found["attainment"] == (0 if outcomes else None)


def test_answers_of_one_token_have_no_further_ones_to_measure() -> None:
    found = summarize([answered(0, 0, 1.0)], 1.0, (99,), {})
    assert (found["mean_ttft_ms"], found["median_tpot_ms"], found["p99_itl_ms"]) == (1000, None, None)
    console = Console(width=120)
    with console.capture() as written:
        console.print(report({"interrupted": False, "left_out": 0, "goodput": {}, **found}, (99,)))
    (row,) = [line.split() for line in written.get().splitlines() if "TPOT" in line]
    assert row == ["TPOT", "-", "-", "-"]


def test_a_server_that_does_not_count_is_counted_by_arrivals() -> None:
    assert answered(0, 0, 1.0, 2.0, 3.0).output_tokens == 3
    assert answered(0, 0, 1.0, 2.0, 3.0).tpot_s == 1.0


def test_details_are_of_every_request() -> None:
    found = details([LATE, failed("overloaded")])
    assert found["ttfts"] == [pytest.approx(0.1), 0.0]
    assert found["itls"][0] == pytest.approx([0.02, 0.04])
    assert found["queue_times"] == [0.5, 0.0]
    assert found["output_lens"] == [3, 0]
    assert found["failure_kinds"] == [None, "overloaded"]


STREAM = b': ping\n\ndata: {"a": 1}\n\ndata:{"b": 2}\r\n\r\nevent: x\nid: 3\ndata: one\ndata: two\n\ndata: [DONE]\n\n'
EVENTS = [b'{"a": 1}', b'{"b": 2}', b"one\ntwo", b"[DONE]"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_come_whole_however_the_network_cuts_them(size: int) -> None:
    splitter = EventSplitter()
    chunks = [STREAM[start : start + size] for start in range(0, len(STREAM), size)]
    assert [data for chunk in chunks for data in splitter.feed(chunk)] == EVENTS


def test_an_endless_event_is_refused() -> None:
    splitter = EventSplitter()
    with pytest.raises(Malformed, match="larger than"):
        list(splitter.feed(b"data: " + b"x" * MAX_EVENT_BYTES))
