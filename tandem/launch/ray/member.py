"""A member of the service on a Ray cluster, as the actor that Ray places: the router, or a worker."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from typing import Any

import ray

from tandem.config import LogConfig
from tandem.errors import TandemError
from tandem.launch.ray.hosted import Hosted, Node, serve_spec
from tandem.launch.ray.plan import POOLS, ROUTER, Spec
from tandem.process import logs
from tandem.process.entry import keep_torch_out


class MemberActor:
    """The process of one member. Ray's thread only answers questions; the service runs in a thread of its own."""

    def __init__(self, spec: str) -> None:
        settings = LogConfig()
        with suppress(TandemError):  # of another version: what serves here says so
            parsed = Spec.parse(spec)
            settings = parsed.config().log
            if parsed.pool == ROUTER:
                keep_torch_out()
        logs.configure(settings.level, settings.format)
        self._spec = spec
        self._node = _this_node()
        self._hosted = Hosted(partial(serve_spec, spec, self._node))

    def state(self) -> dict[str, Any]:
        """As a Member's fields."""
        hosted = self._hosted
        return {
            "spec": self._spec,
            "phase": str(hosted.phase),
            "address": hosted.address,
            "worker_id": hosted.worker_id,
            "pid": os.getpid(),
            "node": self._node.ip,
            "error": hosted.error,
            "code": hosted.code,
        }

    def drain(self) -> None:
        self._hosted.drain()


def _this_node() -> Node:
    node_id = ray.get_runtime_context().get_node_id()
    resources: dict[str, float] = next((node["Resources"] for node in ray.nodes() if node["NodeID"] == node_id), {})
    return Node(ray.util.get_node_ip_address(), slots=round(sum(resources.get(pool, 0) for pool in POOLS)))
