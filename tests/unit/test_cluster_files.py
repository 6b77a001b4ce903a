"""The launcher files: valid for Ray, safe by default, and every line that a user must edit is marked."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tandem.launch.ray.plan import POOLS

ROOT = Path(__file__).resolve().parents[2]
CLOUD = ROOT / "cluster.yaml"
ON_PREM = ROOT / "deploy" / "cluster.onprem.yaml"
BOTH = pytest.mark.parametrize("path", [CLOUD, ON_PREM], ids=["cloud", "onprem"])
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")

# Of these, every value is a user's own: an address, an account, a price.
KEYS = ("region", "availability_zone", "InstanceType", "ImageId", "ssh_private_key")
LIMITS = ("min_workers", "max_workers", "idle_timeout_minutes")
THEIRS = rf"\b(10\.\d+\.\d+\.\d+|({'|'.join(KEYS + LIMITS)}):)"


def load(path: Path) -> dict[str, Any]:
    config = yaml.safe_load(path.read_text())
    assert isinstance(config, dict)
    return config


def code(path: Path) -> list[str]:
    """Its lines, without those that are all comment."""
    return [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]


@BOTH
def test_ray_accepts_it(path: Path) -> None:
    validate_config(prepare_config(load(path)))


@BOTH
def test_ray_refuses_what_it_does_not_know(path: Path) -> None:
    with pytest.raises(Exception, match="workerz"):
        validate_config(prepare_config({**load(path), "workerz": 2}))


@BOTH
def test_what_is_a_users_own_is_marked(path: Path) -> None:
    theirs = [line for line in code(path) if re.search(THEIRS, line)]
    assert len(theirs) >= 5
    assert [line for line in theirs if "# EDIT" not in line] == []


def test_onprem_account_is_marked() -> None:
    assert "# EDIT" in next(line for line in code(ON_PREM) if "ssh_user:" in line)


@BOTH
def test_tokens_are_asked_for(path: Path) -> None:
    """Every shell on a node sources the profile, and it turns authentication on; the token gets to every node."""
    config = load(path)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "tandem/deploy/profile.sh" in config["setup_commands"][0]
    assert "export RAY_AUTH_MODE=token" in (ROOT / "deploy" / "profile.sh").read_text().splitlines()


@BOTH
def test_dashboard_is_on_loopback(path: Path) -> None:
    heads = [command for command in load(path)["head_start_ray_commands"] if "ray start" in command]
    assert len(heads) == 1
    assert "--dashboard-host=127.0.0.1" in heads[0]


@BOTH
def test_every_start_goes_through_the_common_script(path: Path) -> None:
    config = load(path)
    starts = [command for key in STARTS for command in config[key] if "ray start" in command]
    assert len(starts) == 2
    assert all("~/tandem/deploy/on-node.sh ray start" in command for command in starts)


@BOTH
def test_nodes_get_every_package_and_what_installs_them(path: Path) -> None:
    """A new top-level package must be mounted too."""
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    needed = {pattern.rstrip("*") for pattern in found} | {"Makefile", "README.md", "pyproject.toml", "constraints.txt"}
    mounts = load(path)["file_mounts"]
    assert needed <= set(mounts.values())
    for target, source in mounts.items():
        if source != "~/.ray/auth_token":
            assert target == f"~/tandem/{source}"
            assert (ROOT / source).exists()


def test_cloud_pools_are_those_of_tandem() -> None:
    config = load(CLOUD)
    types = config["available_node_types"]
    assert config["head_node_type"] == "head"
    assert set(types) == {"head", "prefill", "decode"}
    for pool in ("prefill", "decode"):
        assert types[pool]["resources"] == {pool: 1}
        assert types[pool]["labels"] == {"pool": pool}
        assert 0 < types[pool]["min_workers"] <= types[pool]["max_workers"]
    assert sum(kind.get("max_workers", 0) for kind in types.values()) <= config["max_workers"]
    assert not set(POOLS) & set(types["head"]["resources"])


def test_onprem_names_a_pool_for_every_machine() -> None:
    config = load(ON_PREM)
    start = config["worker_start_ray_commands"][-1]
    chosen = dict(re.findall(r"^\s*([\d.]+)\) pool=(\w+) workers=\d+ ;;", start, re.MULTILINE))
    assert set(chosen) == set(config["provider"]["worker_ips"])
    assert set(chosen.values()) == {"prefill", "decode"} <= set(POOLS)
