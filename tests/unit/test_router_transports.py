"""Which transport two workers are told to use."""

from __future__ import annotations

import pytest

from router.pool.transports import pick
from tandem.errors import Unavailable
from tandem.v1.registry_pb2 import Transport

RAY_WINS_BYTES = 16 << 20
RAY = {"name": "ray", "rank": 10, "least_kv_bytes": RAY_WINS_BYTES}
GRPC = Transport(name="grpc", rank=1)
HERE, THERE = (Transport(**RAY, domain="cluster", node=node) for node in ("n1", "n2"))
SHM = Transport(name="shm", domain="host", rank=30)
NIXL, NIXL_OF_GPUS = (Transport(name="nixl", domain="version", rank=rank) for rank in (0, 20))
ELSEWHERE = Transport(**RAY, domain="another", node="n1")


@pytest.mark.parametrize(
    ("source", "target", "auto"),
    [
        ([GRPC], [GRPC], "grpc"),
        ([GRPC, NIXL], [GRPC, NIXL], "grpc"),
        ([GRPC, NIXL_OF_GPUS], [GRPC, NIXL], "grpc"),
        ([GRPC, NIXL_OF_GPUS], [GRPC, NIXL_OF_GPUS], "nixl"),
        ([GRPC, SHM, NIXL_OF_GPUS], [GRPC, SHM, NIXL_OF_GPUS], "shm"),
        ([GRPC, HERE], [GRPC], "grpc"),
        ([GRPC], [HERE, GRPC], "grpc"),
        ([GRPC, HERE], [HERE, GRPC], "ray"),
        ([GRPC, HERE], [THERE, GRPC], "grpc"),
        ([GRPC, HERE], [ELSEWHERE, GRPC], "grpc"),
        ([GRPC, SHM, HERE], [GRPC, SHM, HERE], "shm"),
        ([GRPC, SHM], [GRPC, Transport(name="shm", domain="another", rank=30)], "grpc"),
        ([GRPC, Transport(name="pigeon", node="n1")], [GRPC, Transport(name="pigeon", node="n1")], "grpc"),
    ],
    ids=[
        "alone",
        "nixl over TCP",
        "one GPU",
        "GPU to GPU",
        "one host with NIXL",
        "not the target",
        "not the source",
        "one node",
        "one cluster",
        "two clusters",
        "one host",
        "two hosts",
        "unknown",
    ],
)
def test_auto_takes_what_wins(source: list[Transport], target: list[Transport], auto: str) -> None:
    assert pick("auto", source, target, RAY_WINS_BYTES) == auto
    assert pick("auto", source, target, RAY_WINS_BYTES - 1) == ("grpc" if auto == "ray" else auto)


def test_an_order_is_obeyed_where_it_can_be() -> None:
    assert pick("grpc", [GRPC, HERE], [GRPC, HERE], RAY_WINS_BYTES) == "grpc"
    assert pick("ray", [GRPC, HERE], [GRPC, THERE], 1) == "ray"
    with pytest.raises(Unavailable, match="do not share the KV transport ray; in common they have: grpc"):
        pick("ray", [GRPC, HERE], [GRPC, ELSEWHERE], 1)
    with pytest.raises(Unavailable, match="grpc; in common they have: none"):
        pick("auto", [], [GRPC], 1)
