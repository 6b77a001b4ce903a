"""The launcher file for own machines, on three hosts: Ray's real `ray up`, Tandem on top, `ray down`, and nothing left.

The tests of this file run in order, on one cluster.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from onprem import OnPremCluster, left_running, onprem_cluster
from service import wait_until

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def cluster() -> Iterator[OnPremCluster]:
    with onprem_cluster() as cluster:
        yield cluster


def test_every_node_has_its_pool(cluster: OnPremCluster) -> None:
    nodes = cluster.python_on_head("""
        ray.init(address="auto", log_to_driver=False)
        for node in ray.nodes():
            pools = {pool: count for pool, count in node["Resources"].items() if pool in ("prefill", "decode")}
            print("node", node["NodeManagerAddress"], pools, node["Labels"].get("pool"))
    """)
    addresses = {name: host.address for name, host in cluster.nodes.items()}
    assert {line for line in nodes.splitlines() if line.startswith("node ")} == {
        f"node {addresses['head']} {{'decode': 1.0}} None",
        f"node {addresses['one']} {{'prefill': 1.0}} prefill",
        f"node {addresses['two']} {{'decode': 1.0}} decode",
    }


def test_who_has_no_token_is_refused(cluster: OnPremCluster) -> None:
    """From a machine of the same network, with Ray installed."""
    asks = f"ray status --address {cluster.head.address}:6379"
    assert "prefill" in cluster.laptop.run("bash", "-c", f"RAY_AUTH_MODE=token {asks}")
    for wrong in ("RAY_AUTH_MODE=disabled", "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=0123456789abcdef0123456789abcdef"):
        refused = cluster.laptop.run("bash", "-c", f"{wrong} {asks}", check=False)
        assert "prefill" not in refused
        assert "nauthenticated" in refused, refused


def test_dashboard_listens_on_loopback_only(cluster: OnPremCluster) -> None:
    listening = cluster.head.run("ss", "-Hltn", "sport = :8265").split()
    assert "127.0.0.1:8265" in listening
    assert not [address for address in listening if address.endswith(":8265") and address != "127.0.0.1:8265"]


def test_down_leaves_nothing(cluster: OnPremCluster) -> None:
    cluster.down()
    wait_until(lambda: not any(map(left_running, cluster.nodes.values())), 20, "the end of all that Ray started")
    assert [host.run("ls", "-A", "/dev/shm") for host in cluster.nodes.values()] == [""] * 3
