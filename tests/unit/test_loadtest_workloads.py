"""What requests ask: lengths, shared prefixes, traces, and plans that make no sense."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from loadtest.objectives import Objectives, parse_goodput
from loadtest.schedule.plan import Plan, parse_percentiles
from loadtest.schedule.traces import BLOCK_TOKENS, TraceRow, made_up, read_trace
from loadtest.schedule.workloads import (
    Lengths,
    LoadRequest,
    Vocabulary,
    random_requests,
    trace_requests,
    warm_up_requests,
)
from loadtest.targets.target import Served
from tandem.errors import ConfigError

WORDS = Vocabulary(1000, seed=5)
SERVED = Served("m", vocab_size=1000, max_model_len=1 << 20)


def shared(left: LoadRequest, right: LoadRequest) -> int:
    """Tokens in front that are equal."""
    pairs = zip(left.prompt_ids.tolist(), right.prompt_ids.tolist(), strict=False)
    return next((count for count, (one, other) in enumerate(pairs) if one != other), 0)


def row(tokens: int, *hash_ids: int) -> TraceRow:
    return TraceRow(0.0, tokens, 10, hash_ids)


def test_fixed_lengths_are_fixed_and_prompts_differ() -> None:
    requests = random_requests(20, Lengths(30, 7), WORDS)
    assert {(len(each.prompt_ids), each.output_tokens) for each in requests} == {(30, 7)}
    assert len({tuple(each.prompt_ids) for each in requests}) == 20
    assert max(each.prompt_ids.max() for each in requests) < 1000


def test_random_lengths_fill_their_range() -> None:
    requests = random_requests(2000, Lengths(100, 10, range_ratio=0.5), WORDS)
    assert {min(each.output_tokens for each in requests), max(each.output_tokens for each in requests)} == {5, 15}
    lengths = [len(each.prompt_ids) for each in requests]
    assert (min(lengths), max(lengths)) == (50, 150)
    assert sum(lengths) / 2000 == pytest.approx(100, rel=0.03)


def test_a_prefix_is_shared_by_all() -> None:
    first, second = random_requests(2, Lengths(50, 1, prefix_tokens=20), WORDS)
    assert len(first.prompt_ids) == 70
    assert 20 <= shared(first, second) < 30


def test_a_seed_gives_the_same_requests() -> None:
    def prompts(seed: int) -> list[list[int]]:
        return [each.prompt_ids.tolist() for each in random_requests(5, Lengths(9, 1, 0.4), Vocabulary(50, seed))]

    assert prompts(1) == prompts(1) != prompts(2)


def test_equal_hash_ids_are_equal_tokens() -> None:
    """The first two blocks are shared, then the prompts part, though both have a third."""
    first, second = trace_requests([row(1500, 4, 9, 1), row(2000, 4, 9, 2, 3)], 1.0, WORDS)
    assert (len(first.prompt_ids), len(second.prompt_ids)) == (1500, 2000)
    assert shared(first, second) == pytest.approx(2 * BLOCK_TOKENS, abs=2)


def test_scaling_keeps_who_shares_what() -> None:
    rows = [row(1024 + 256, 4, 9, 1), row(1024 + 512 + 1, 4, 9, 2, 3), row(1024, 4, 9)]
    first, second, third = trace_requests(rows, 0.125, WORDS)
    assert [len(each.prompt_ids) for each in (first, second, third)] == [128 + 32, 128 + 64, 128]
    assert shared(first, second) == pytest.approx(128, abs=2)
    assert third.prompt_ids.tolist() == first.prompt_ids[:128].tolist()
    assert first.output_tokens == 1


def test_a_tiny_scale_leaves_every_request_a_token() -> None:
    (only,) = trace_requests([row(3, 1)], 0.0001, WORDS)
    assert (len(only.prompt_ids), only.output_tokens) == (1, 1)


def test_rows_without_hash_ids_share_nothing() -> None:
    first, second = trace_requests([row(100), row(100)], 2.0, WORDS)
    assert len(first.prompt_ids) == 200
    assert shared(first, second) < 5


def test_warm_up_prompts_are_as_long_and_others() -> None:
    requests = random_requests(2, Lengths(50, 3, 0.5), WORDS)
    warm = warm_up_requests(requests, 3, WORDS)
    assert [len(each.prompt_ids) for each in warm] == [len(requests[index % 2].prompt_ids) for index in range(3)]
    assert shared(warm[0], requests[0]) < 5


def mooncake_line(**changes: Any) -> str:
    whole = {"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [0, 7]}
    return json.dumps(whole | changes) + "\n"


def test_mooncake_rows(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(mooncake_line() + "\n" + mooncake_line(timestamp=6000) + mooncake_line())
    assert read_trace("mooncake", path, limit=2) == [TraceRow(3.0, 600, 5, (0, 7)), TraceRow(6.0, 600, 5, (0, 7))]


def test_azure_rows(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    lines = ("2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,109")
    path.write_text("\r\n".join(("TIMESTAMP,ContextTokens,GeneratedTokens", *lines)))
    first, second = read_trace("azure", path, limit=10)
    assert (first.input_tokens, first.output_tokens, second.input_tokens) == (374, 44, 396)
    assert second.at_s - first.at_s == pytest.approx(4.314579, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no requests"),
        ("{}", "line 1 .* no 'hash_ids'"),
        ("not json", "line 1 "),
        ("[1]", "line 1 "),
        (mooncake_line(input_length=0), "lengths must be in"),
        (mooncake_line(timestamp=1e999), "the time is no number"),
        (mooncake_line() + mooncake_line(hash_ids=[1]), "line 2 .* 600 tokens need 2 hash_ids"),
        ("\xff", "not UTF-8"),
    ],
)
def test_a_bad_trace_names_its_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=words):
        read_trace("mooncake", path, limit=10)


def test_a_missing_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.*No such file"):
        read_trace("azure", tmp_path / "nowhere", limit=1)


def test_the_made_up_trace_has_turns_that_share_their_past() -> None:
    rows = made_up(60, seed=3)
    assert len(rows) == 60
    assert rows == sorted(rows, key=lambda each: each.at_s)
    assert all(len(each.hash_ids) == math.ceil(each.input_tokens / BLOCK_TOKENS) for each in rows)
    assert all(each.hash_ids[:2] == (0, 1) for each in rows)
    # Some prompt goes on where another one was.
    names = [each.hash_ids for each in rows]
    assert any(len(set(one) & set(other)) > 2 for index, one in enumerate(names) for other in names[:index])
    assert rows == made_up(60, seed=3) != made_up(60, seed=4)


def test_a_schedule_is_in_order_and_leaves_out_what_is_too_long() -> None:
    plan = Plan(workload="mooncake", num_prompts=50, scale_lengths=0.1, scale_time=0.5)
    whole = plan.schedule(SERVED)
    times = [each.at_s for each in whole.arrivals]
    assert (len(times), whole.left_out) == (50, 0)
    assert times == sorted(times)
    limit = sorted(each.request.total_tokens for each in whole.arrivals)[29]
    fitting = plan.schedule(Served("m", 1000, max_model_len=limit))
    assert len(fitting.arrivals) == 50 - fitting.left_out
    assert max(each.request.total_tokens for each in fitting.arrivals) == limit


def test_nothing_that_fits_is_an_error() -> None:
    with pytest.raises(ConfigError, match="longer than the model's 64 tokens"):
        Plan().schedule(Served("m", 1000, max_model_len=64))


def test_token_ids_that_the_model_does_not_know_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--vocab-size must be at most 1000, as many token ids as m knows, not 1001"):
        Plan(vocab_size=1001).schedule(SERVED)
    assert Plan(vocab_size=1000).schedule(SERVED).arrivals
    assert Plan(vocab_size=99_999).schedule(Served("m")).arrivals  # nobody said how many it knows


def test_a_rate_replaces_the_times_of_a_trace() -> None:
    times = [each.at_s for each in Plan(workload="mooncake", num_prompts=40, request_rate=10).schedule(SERVED).arrivals]
    assert times[-1] == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_prompts": 0}, "--num-prompts must be in"),
        ({"request_rate": 0}, "--request-rate must be above 0"),
        ({"request_rate": math.nan}, "--request-rate must be above 0"),
        ({"burstiness": -1}, "--burstiness must be above 0"),
        ({"scale_time": math.inf}, "--scale-time must be a number above 0"),
        ({"jitter_s": -1}, "--jitter must be 0 seconds or more"),
        ({"seed": -1}, "--seed must be in"),
        ({"lengths": Lengths(0, 1)}, "--input-len must be in"),
        ({"lengths": Lengths(1, 1, 1.0)}, r"--range-ratio must be in \[0, 1\)"),
        ({"workload": "azure"}, "--workload azure needs --trace"),
        ({"trace": Path("x")}, "--trace belongs to"),
        ({"trace": Path("/nope"), "workload": "mooncake"}, "cannot read the trace /nope: No such file"),
        ({"trace": Path("/"), "workload": "azure"}, "cannot read the trace /: Is a directory"),
        ({"scale_lengths": 2.0}, "--scale-lengths belongs to --workload mooncake or azure"),
        ({"scale_time": 2.0}, "--scale-time moves the arrivals of a trace"),
        ({"jitter_s": 1.0}, "--jitter moves the arrivals of a trace"),
        ({"jitter_s": 1.0, "workload": "mooncake", "request_rate": 2.0}, "and no rate"),
        ({"vocab_size": 0}, "--vocab-size must be 1 or more"),
        ({"vocab_size": 2**31}, "--vocab-size must be at most 2147483647, not 2147483648"),
    ],
)
def test_plans_that_make_no_sense(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Plan(**fields)


def test_more_prompt_tokens_than_can_be_held_are_refused_before_they_are_made() -> None:
    with pytest.raises(ConfigError, match="prompt tokens are more than"):
        Plan(num_prompts=1_000_000).schedule(SERVED)


def test_objectives_come_in_one_text_or_several() -> None:
    limits = {"ttft": 500, "tpot": 50, "e2el": 9000}
    assert parse_goodput(["ttft:500 tpot:50", "e2el:9e3"]) == Objectives(limits)
    for wrong in ("ttft", "itl:5", "ttft:0", "ttft:nan", "ttft:inf", "ttft:x", "ttft:0x", "ttft:4xx", "ttft:1_0x", "x"):
        with pytest.raises(ConfigError, match="--goodput takes"):
            parse_goodput([wrong])
    with pytest.raises(ConfigError, match="--goodput names ttft twice"):
        parse_goodput(["ttft:5", "tpot:5 ttft:6x"])


def test_objectives_in_times_of_what_an_answer_takes_alone() -> None:
    asked = parse_goodput(["tpot:1.5x e2el:900 ttft:4x"])
    assert asked == Objectives({"e2el": 900}, {"tpot": 1.5, "ttft": 4})
    assert asked.metrics == {"ttft", "tpot", "e2el"}
    in_ms = asked.in_ms({"ttft": 100.04, "tpot": 0.01})
    assert list(in_ms.items()) == [("ttft", 400.2), ("tpot", 0.015), ("e2el", 900)]
    for tpot in ({}, {"tpot": 0.0}, {"tpot": math.inf}):
        with pytest.raises(ConfigError, match="--goodput tpot:2x is no limit"):
            parse_goodput(["ttft:4x tpot:2x"]).in_ms({"ttft": 100.0, **tpot})


def test_percentiles_are_numbers_up_to_100() -> None:
    assert parse_percentiles("50,99.9") == (50.0, 99.9)
    for wrong in ("", "101", "a", "nan"):
        with pytest.raises(ConfigError, match="--percentiles must be"):
            parse_percentiles(wrong)
