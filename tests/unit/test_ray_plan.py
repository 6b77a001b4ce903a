"""What a service on a Ray cluster consists of, and what is to be done to get there."""

from __future__ import annotations

from typing import Any

import pytest

from tandem import __version__
from tandem.config import TandemConfig, load_config
from tandem.errors import ConfigError, Refused, TandemError, Unavailable
from tandem.launch.ray.plan import (
    Changes,
    Member,
    Spec,
    cannot_serve,
    config_of,
    demand,
    missing,
    parse_counts,
    plan_changes,
    router_address,
    turns_of,
    wanted_specs,
)

HEAD = "10.0.0.1"


def config(**settings: dict[str, Any]) -> TandemConfig:
    return load_config(overrides=settings)


def specs(**settings: dict[str, Any]) -> dict[str, str]:
    return wanted_specs(config(**settings), HEAD)


def running(texts: dict[str, str], phase: str = "serving") -> dict[str, Member]:
    return {name: Member(spec=text, phase=phase) for name, text in texts.items()}


def test_a_service_is_a_router_and_numbered_workers() -> None:
    wanted = specs(serve={"prefill": 2, "decode": 1, "colocated": 1})
    assert list(wanted) == ["router", "prefill-0", "prefill-1", "decode-0", "colocated-0"]
    assert router_address(wanted) == "10.0.0.1:8700"


def test_what_nobody_has_set_is_left_to_the_node_and_the_head() -> None:
    wanted = specs()
    assert Spec.parse(wanted["router"]).config().router.host == HEAD
    worker = Spec.parse(wanted["decode-0"]).config()
    assert "host" not in worker.worker.model_fields_set
    assert "path" not in worker.model.model_fields_set


def test_a_member_of_a_later_version_may_say_more_of_itself() -> None:
    told = {"spec": "text", "phase": "serving", "pid": 7, "since": "yesterday", "weights": [1]}
    assert Member.of(told) == Member(spec="text", phase="serving", pid=7)


POOLS = {"prefill": 3, "decode": 2}


def turns(*, before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> list[list[str]]:
    seen, wanted = running(specs(**before)), specs(**after)
    return turns_of(plan_changes(wanted, seen), wanted, seen)


def test_changed_workers_are_replaced_one_of_each_pool_at_a_time() -> None:
    before = {"serve": POOLS, "engine": {"kv_memory_mib": 64}}
    after = {"serve": {**POOLS, "decode": 3}, "engine": {"kv_memory_mib": 32}}
    assert turns(before=before, after=after) == [
        ["decode-2", "prefill-0", "decode-0"],
        ["prefill-1", "decode-1"],
        ["prefill-2"],
    ]
    assert turns(before=before, after={**before, "router": {"lease_s": 5}}) == [["router"]]
    assert turns(before=before, after=before) == [[]]


@pytest.mark.parametrize(
    "change",
    [
        {"engine": {"block_size": 32}},
        {"engine": {"device": "cuda"}},
        {"model": {"max_model_len": 64}},
        {"router": {"port": 9}},
    ],
)
def test_workers_that_would_not_serve_beside_the_old_ones_are_replaced_at_once(change: dict[str, Any]) -> None:
    (only,) = turns(before={"serve": POOLS}, after={"serve": POOLS, **change})
    assert {name for name in only if name != "router"} == {name for name in specs(serve=POOLS) if name != "router"}


def test_what_another_version_started_is_replaced_at_once_and_what_has_failed_first() -> None:
    wanted = specs(serve=POOLS, engine={"kv_memory_mib": 32})
    seen = running({name: text.replace(__version__, "0.0.0") for name, text in wanted.items()})
    assert turns_of(plan_changes(wanted, seen), wanted, seen) == [list(wanted)]
    seen = {**running(specs(serve=POOLS)), "prefill-2": Member(phase="failed", error="of Ray")}
    first, second = turns_of(plan_changes(wanted, seen), wanted, seen)
    assert first == ["prefill-0", "prefill-2", "decode-0"]
    assert second == ["prefill-1", "decode-1"]


@pytest.mark.parametrize(
    ("code", "kind"), [("config", ConfigError), ("model_refused", ConfigError), ("refused", Refused), ("", Refused)]
)
def test_who_is_to_blame_for_a_member_that_cannot_serve(code: str, kind: type[TandemError]) -> None:
    """`tandem serve --ray` exits with 2 when it is what it was asked for."""
    error = cannot_serve("decode-0", Member(phase="failed", node="10.0.0.2", error="there is no model nope", code=code))
    assert type(error) is kind
    assert error.message == "decode-0 cannot serve on node 10.0.0.2: there is no model nope"


@pytest.mark.parametrize(("host", "address"), [("0.0.0.0", "10.0.0.1:8700"), ("10.9.9.9", "10.9.9.9:8700")])
def test_workers_dial_where_the_router_listens(host: str, address: str) -> None:
    wanted = specs(router={"host": host}, worker={"host": "10.0.0.2"})
    assert router_address(wanted) == address
    assert Spec.parse(wanted["router"]).config().router.host == host
    assert Spec.parse(wanted["decode-0"]).config().worker.host == "10.0.0.2"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"router": {"port": 0}}, "router.port must be fixed"),
        ({"router": {"http_port": 0}}, "router.http_port must be fixed"),
        ({"serve": {"prefill": 0}}, "nobody would play prefill"),
        ({"worker": {"port": 9000}}, "worker.port can belong to one worker only"),
        ({"router": {"transport": "nixl"}}, "router.transport nixl needs worker.nixl_devices"),
    ],
)
def test_what_cannot_serve_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        specs(**settings)


def test_a_spec_of_another_version_is_refused() -> None:
    text = specs()["router"].replace('"tandem": "', '"tandem": "7.')
    with pytest.raises(Refused, match=r"7\..* where the service was started"):
        Spec.parse(text)


def test_the_same_service_again_changes_nothing() -> None:
    assert plan_changes(specs(), running(specs())) == Changes()


def test_other_counts_change_only_these() -> None:
    seen = running(specs(serve={"prefill": 1, "decode": 3}))
    plan = plan_changes(specs(serve={"prefill": 2, "decode": 1}), seen)
    assert plan == Changes(start=["prefill-1"], leave=["decode-1", "decode-2"])


@pytest.mark.parametrize(
    ("settings", "replaced"),
    [
        ({"engine": {"kv_memory_mib": 64}}, ["prefill-0", "decode-0"]),
        ({"router": {"lease_s": 20.0}}, ["router"]),
        ({"router": {"port": 8710}}, ["router", "prefill-0", "decode-0"]),
        ({"model": {"name": "other"}}, ["router", "prefill-0", "decode-0"]),
    ],
)
def test_changed_settings_replace_those_that_they_concern(settings: dict[str, Any], replaced: list[str]) -> None:
    assert plan_changes(specs(**settings), running(specs())) == Changes(replace=replaced)


def test_members_that_ended_are_replaced_and_silent_ones_waited_for() -> None:
    seen = running(specs()) | {"prefill-0": Member(), "decode-0": Member(phase="failed", error="no model")}
    assert plan_changes(specs(), seen) == Changes(replace=["decode-0"])


def test_a_running_service_tells_its_configuration() -> None:
    started = config(engine={"kv_memory_mib": 64}, router={"lease_s": 20.0}, serve={"prefill": 2, "decode": 1})
    wanted = wanted_specs(started, HEAD)
    found = config_of(running(wanted))
    assert (found.serve.prefill, found.serve.decode, found.serve.colocated) == (2, 1, 0)
    assert wanted_specs(found, HEAD) == wanted


@pytest.mark.parametrize(
    ("silent", "words"), [(["router"], "the router is missing"), (["prefill-0", "decode-0"], "every worker is missing")]
)
def test_a_service_that_is_half_gone_cannot_tell(silent: list[str], words: str) -> None:
    with pytest.raises(Unavailable, match=words):
        config_of(running(specs()) | {name: Member() for name in silent})


def test_nothing_that_runs_is_said_so() -> None:
    with pytest.raises(Unavailable, match="nothing is served on this cluster"):
        config_of({})


def test_counts_are_read_from_words() -> None:
    assert parse_counts(["prefill=3", "colocated=0"]) == {"prefill": 3, "colocated": 0}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["speed=3"], "there is no pool 'speed'; pools are prefill, decode, colocated"),
        (["prefill=-1"], "prefill takes a number of workers"),
        (["decode=two"], "decode takes a number of workers"),
        (["decode=" + "9" * 5000], "decode takes a number of workers"),
        (["decode"], "decode takes a number of workers"),
        (["decode=1", "decode=2"], "decode is given twice"),
    ],
)
def test_counts_that_are_none_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_counts(words)


def test_an_autoscaler_hears_of_workers_places() -> None:
    assert demand(["router", "prefill-0", "decode-0"], "cpu") == [{"prefill": 1}, {"decode": 1}]
    assert demand(["colocated-0"], "cuda") == [{"colocated": 1, "GPU": 1}]


def test_what_is_missing_is_named() -> None:
    wanted = specs(serve={"prefill": 2, "decode": 3})
    seen = running(wanted) | {
        "decode-1": Member(),
        "decode-2": Member(),
        "prefill-1": Member(phase="starting", node="10.0.0.2"),
    }
    words = missing(wanted, seen, {"prefill": 2.0, "decode": 1.0, "CPU": 8.0}, 120, "cpu")
    assert words == (
        "not ready within 120 s: 2 of 3 decode workers found no node with a free `decode` resource; "
        "prefill-1 on 10.0.0.2 is still starting "
        "(the cluster's nodes offer prefill 2, decode 1): add nodes or ask for fewer"
    )


def test_a_missing_gpu_is_named() -> None:
    wanted = specs(serve={"prefill": 1, "decode": 1})
    seen = {name: Member() for name in wanted}
    words = missing(wanted, seen, {"prefill": 2.0, "decode": 2.0, "GPU": 1.0}, 5, "cuda")
    assert "1 of 1 prefill workers found no node with a free `GPU` resource" in words
    assert words.endswith("(the cluster's nodes offer prefill 2, decode 2, GPU 1): add nodes or ask for fewer")


def test_a_worker_that_ends_while_it_starts_is_not_blamed_on_nodes() -> None:
    wanted = specs(serve={"prefill": 1, "decode": 1})
    seen = running(wanted) | {"decode-0": Member()}
    words = missing(wanted, seen, {"prefill": 2.0, "decode": 2.0}, 5, "cpu")
    assert "decode-0 did not come up: " in words
    assert "worker-*.err" in words
    assert "add nodes" not in words
