"""The typed pools of cluster.yaml under Ray's real autoscaler: nodes come when `tandem serve --ray` asks for them, and
go when `tandem scale` needs them no more. Only the cloud is not real: Ray's fake provider starts nodes as processes of
one host, which is a host of its own here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from hosts import Host, private_network
from onprem import install_environment
from service import ROOT, wait_until

import tandem

pytestmark = pytest.mark.timeout(400)

# Ray's fake provider knows its head by this name only.
FAKE_HEAD = "ray.head.default"
PLASMA_BYTES = 100 << 20
START = (
    "ray start --head --port=6379 --num-cpus=1 --include-dashboard=false --disable-usage-stats "
    f"--object-store-memory={PLASMA_BYTES} --autoscaling-config=$HOME/fake.yaml"
)
# One autoscaler update a second; nodes that nobody needs leave after six.
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "0",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
}
IDLE_MINUTES = 0.1
# Its nodes share one address, and need neither SSH nor set-up.
PROVIDER = {
    "type": "fake_multinode",
    "use_node_id_as_ip": True,
    "disable_node_updaters": True,
    "disable_launch_config_check": True,
}
# Nothing is copied to nodes or set up there.
NOTHING = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter"),
)
SETTINGS = "engine: {threads: 1, kv_memory_mib: 32}\n"


def faked(config: dict[str, Any]) -> dict[str, Any]:
    """cluster.yaml with its pools, limits and labels, on the fake provider, from no worker node at all."""
    kinds = {}
    for name, kind in config["available_node_types"].items():
        is_head = name == config["head_node_type"]
        kinds[FAKE_HEAD if is_head else name] = {
            "resources": {"CPU": 1, "object_store_memory": PLASMA_BYTES, **kind["resources"]},
            "labels": kind.get("labels", {}),
            "node_config": {},
            "min_workers": 0,
            "max_workers": 0 if is_head else kind["max_workers"],
        }
    return {
        **config,
        **{key: [] for key in NOTHING},
        "provider": PROVIDER,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "upscaling_speed": 100,
        "idle_timeout_minutes": IDLE_MINUTES,
        "head_node_type": FAKE_HEAD,
        "available_node_types": kinds,
    }


@pytest.fixture(scope="module")
def head() -> Iterator[Host]:
    with private_network("head") as network:
        host = network.hosts["head"]
        install_environment(host, str(ROOT))
        config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
        own = network.folder / "home-head"
        (own / "fake.yaml").write_text(yaml.safe_dump(faked(config)))
        (own / "service.yaml").write_text(SETTINGS)
        host.run("ray", "get-auth-token", "--generate")
        host.run("bash", "-c", START, env=ENVIRONMENT)
        try:
            yield host
        finally:
            print(host.run("bash", "-c", "tail -n 100 /tmp/ray/session_latest/logs/monitor.log"))


def nodes(head: Host) -> Counter[str]:
    """Living worker nodes by their label `pool`; each must offer its pool's resource."""
    script = """if True:
        import ray
        ray.init(address="auto", log_to_driver=False)
        for node in ray.nodes():
            pool = node["Labels"].get("pool")
            if node["Alive"] and pool:
                assert node["Resources"][pool] == 1, node
                print("pool", pool)
    """
    said = head.run("python", "-W", "ignore", "-c", script, env=ENVIRONMENT)
    return Counter(line.split()[1] for line in said.splitlines() if line.startswith("pool "))


def tandem_command(head: Host, command: str) -> str:
    return head.run("bash", "-c", f"tandem {command}", env=ENVIRONMENT, timeout_s=200)


def test_nodes_come_and_go_with_the_service(head: Host) -> None:
    assert nodes(head) == {}
    said = tandem_command(head, "serve --ray --prefill 2 --decode 1 --config ~/service.yaml")
    assert f"ready at {head.address}:8700: model tiny, 2 prefill + 1 decode" in said
    assert nodes(head) == {"prefill": 2, "decode": 1}
    with tandem.Client(f"{head.address}:8700") as client:
        assert client.complete("The color of dog", timeout_s=30).text == " can vary widely"

        said = tandem_command(head, "scale prefill=1")
        assert "1 prefill + 1 decode" in said
        wait_until(lambda: nodes(head) == {"prefill": 1, "decode": 1}, 60, "a prefill node to be given back")
        assert client.complete("The capital of France is", timeout_s=30).text == " Paris"
        assert client.status(check_integrity=True).problems() == []

    assert "stopped" in tandem_command(head, "down")
    wait_until(lambda: nodes(head) == {}, 60, "all worker nodes to be given back")
