"""Prefill interference and the rows of the timeline, on answers written by hand."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from made_comparison import TWO, made_run

from loadtest.compare.html.interference import Window, busiest_window, prefills, waits, worst_window
from loadtest.compare.html.lanes import lanes
from loadtest.compare.model import ShownAnswer, ShownRun


def answer(start_s: float, prefill_s: float, arrivals_s: list[float], workers: str = "a a", **more: Any) -> ShownAnswer:
    """Waits for nothing; its arrivals are counted from the first token on, which is one."""
    first_s = start_s + prefill_s
    prefill_worker, decode_worker = workers.split()
    times = [first_s, *(first_s + at_s for at_s in arrivals_s)]
    marks_s = {"received": 0.0, "prefill_started": 0.0, "first_token": prefill_s, "finished": times[-1] - start_s}
    if prefill_worker != decode_worker:
        marks_s["kv_sealed"] = prefill_s + 0.01
    return ShownAnswer(
        prompt_tokens=8,
        output_tokens=len(times),
        scheduled_s=start_s,
        sent_s=start_s,
        arrivals_s=times,
        phases_ms={name: at_s * 1000 for name, at_s in marks_s.items()},
        prefill_worker=prefill_worker,
        decode_worker=decode_worker,
        met=True,
        **more,
    )


def run_of(*answers: ShownAnswer) -> ShownRun:
    run = made_run(TWO[0], 1.0, count=1)
    return run.model_copy(update={"answers": list(answers), "use": [], "duration_s": 100.0})


def test_waits_are_disturbed_by_prefills_of_others_on_their_own_worker() -> None:
    decoding = answer(0.0, 1.0, [0.1, 0.2, 0.9, 1.0])
    other = answer(1.2, 0.6, [0.05])  # computed while `decoding` waits from 1.2 to 1.9 s
    assert waits([decoding, other]).disturbed.tolist() == [False, False, True, False, False]
    assert waits([decoding, other]).ms == pytest.approx([100, 100, 700, 100, 50])
    elsewhere = answer(1.2, 0.6, [0.05], workers="b a")
    assert not waits([decoding, elsewhere]).disturbed.any()


def test_a_wait_counts_as_disturbed_when_more_than_half_of_it_is() -> None:
    decoding = answer(0.0, 1.0, [1.0])
    for prefill_s, expected in ((0.49, False), (0.51, True)):
        assert waits([decoding, answer(1.2, prefill_s, [])]).disturbed.tolist() == [expected]


def test_prefills_at_the_same_time_count_once() -> None:
    spans = prefills([answer(0.0, 1.0, []), answer(0.5, 1.0, []), answer(3.0, 1.0, []), answer(0.0, 9.0, [], "b b")])
    assert spans == {"a": [(0.0, 1.5), (3.0, 4.0)], "b": [(0.0, 9.0)]}


def test_the_window_lies_where_decoding_lost_most_to_prefills() -> None:
    calm = [answer(10.0 * k, 0.5, [0.1 * n for n in range(1, 20)]) for k in range(6)]
    alone = answer(70.0, 0.9, [4.0])
    delayed = [answer(80.0, 0.5, [0.1, 0.2, 1.0, 1.1]), answer(80.7, 0.75, [])]
    window = worst_window(run_of(*calm, alone, *delayed))
    # Neither where a lone prompt is computed nor at a long wait that no prefill explains.
    assert window.start_s < 80.7 < 81.5 < window.end_s
    quiet = run_of(*calm, alone)
    assert worst_window(quiet) == busiest_window(quiet, worst_window(quiet).length_s)


def test_a_split_answer_stays_on_two_workers() -> None:
    found = lanes(run_of(answer(0.0, 1.0, [0.1, 0.2], workers="p d")), Window(0.0, 5.0))
    (prefill,), (decode,) = ([stay for row in lane.rows for stay in row] for lane in reversed(found.lanes))
    assert [span.part for span in prefill.spans] == ["queued", "prefill", "handoff"]
    assert [span.part for span in decode.spans] == ["decode"]
    assert prefill.ticks == [(1.0, None)]
    assert [at_s for at_s, _ in decode.ticks] == pytest.approx([1.1, 1.2])


def test_no_two_requests_of_a_row_overlap_and_those_without_a_row_are_counted() -> None:
    many = [answer(0.1 * k, 1.0, [0.5]) for k in range(100)]
    found = lanes(run_of(*many), Window(0.0, 10.0))
    (lane,) = found.lanes
    for row in lane.rows:
        stays = sorted(row, key=lambda stay: stay.start_s)
        assert all(one.end_s <= other.start_s for one, other in pairwise(stays))
    crowded = lanes(run_of(*(answer(0.0, 1.0, [0.5]) for _ in range(100))), Window(0.0, 10.0))
    assert crowded.left_out == 100 - len(crowded.lanes[0].rows) == 40


def test_requests_outside_the_window_are_not_there() -> None:
    found = lanes(run_of(answer(0.0, 1.0, [0.5]), answer(50.0, 1.0, [0.5])), Window(40.0, 20.0))
    assert [stay.request for lane in found.lanes for row in lane.rows for stay in row] == [1]
