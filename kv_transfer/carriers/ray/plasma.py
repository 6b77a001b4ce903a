"""Payloads in Ray's object store (plasma): the only module of this package that knows Ray.

Whoever puts an object owns it: it stays while the owner holds the handle that `put` gave, and is gone soon after. A
reader on the owner's node reads the very memory; on another node Ray pulls a copy first. Objects are raw bytes on both
ends, never serialized: an object of any other kind, and what Ray stores in place of one that is lost, is not looked at.

Everything but `connect` blocks and belongs in a thread.
"""

from __future__ import annotations

import ipaddress
import logging
import sys
import time
from dataclasses import dataclass
from threading import Event
from typing import Any

from tandem.errors import TransferFailed

log = logging.getLogger(__name__)

# An object that lives arrives within this time, or its owner cannot be reached.
TAKE_TIMEOUT_S = 10.0
# How long a reader whom nobody waits for any more goes on waiting.
_SLICE_S = 1.0
_ID_BYTES = 28
_RAW = b"RAW"


@dataclass(frozen=True)
class Place:
    """Where a payload lies in the object store; what the bytes mean, and whether they do, is the store's to say."""

    object_id: bytes
    # The process that holds the object for as long as the transfer needs it.
    owner: bytes


def connect() -> Plasma | None:
    """The object store of this process's node, if the process is part of a Ray cluster."""
    if "ray" not in sys.modules:  # importing it takes a second, and nobody has
        return None
    import ray

    return Plasma() if ray.is_initialized() else None


class Plasma:
    def __init__(self) -> None:
        import ray
        from ray._private.worker import global_worker

        self._core: Any = global_worker.core_worker
        # Two processes share objects when this is equal: the cluster.
        self.domain: str = global_worker.gcs_client.cluster_id.hex()
        # And they share memory when this is too.
        self.node: str = ray.get_runtime_context().get_node_id()
        self._raylet = self._dial_raylet()

    def put(self, payload: bytes) -> tuple[object, Place]:
        """Copies the payload into an object. Dropping the first of the two frees it. Raises TransferFailed."""
        from ray._raylet import RawSerializedObject  # type: ignore[attr-defined]  # its stub is not whole
        from ray.exceptions import RayError

        try:
            handle = self._core.put_object(
                RawSerializedObject(payload), pin_object=True, inline_small_object=False, _is_experimental_channel=False
            )
        except RayError as error:
            log.warning("Ray's object store took no object of %d bytes: %s", len(payload), error)
            raise TransferFailed(f"Ray's object store took no payload of {len(payload)} bytes") from None
        _, owner, _ = self._core.serialize_object_ref(handle)
        return handle, Place(handle.binary(), owner)

    def take(self, place: Place, size: int, unwanted: Event) -> memoryview:
        """The payload, read-only and without a copy. Raises TransferFailed for one that is lost or not of this size.

        Set `unwanted` when nobody waits for it any more.
        """
        from ray._raylet import ObjectRef
        from ray.exceptions import RayError

        owner = _checked_owner(place)
        ref: Any = ObjectRef(place.object_id, owner, "")  # type: ignore[arg-type]  # its stub is wrong
        try:
            # The owner is asked for the object's state, whatever the sender may have known of it.
            self._core.deserialize_and_register_object_ref(place.object_id, ObjectRef.nil(), owner, b"")
            data, metadata = self._wait(ref, unwanted)
        except RayError as error:
            raise TransferFailed(f"a payload in Ray's object store cannot be read: {type(error).__name__}") from None
        if metadata != _RAW or data is None:
            raise TransferFailed("a payload in Ray's object store is lost")
        payload = memoryview(data).toreadonly()
        if payload.nbytes != size:
            raise TransferFailed(f"a payload in Ray's object store has {payload.nbytes} bytes where {size} were put")
        return payload

    def room(self) -> int:
        """Bytes that new objects find before Ray would move others, or them, to disk. Raises TransferFailed."""
        import grpc
        from ray.core.generated import node_manager_pb2

        request = node_manager_pb2.GetNodeStatsRequest(include_memory_info=False)
        try:
            stats = self._raylet.GetNodeStats(request, timeout=TAKE_TIMEOUT_S).store_stats
        except grpc.RpcError as error:
            log.warning("Ray's node manager does not answer: %s", error)
            raise TransferFailed("Ray's node manager does not say how full its object store is") from None
        # Copies that were pulled from elsewhere, or whose owner has let go, make way for new objects.
        return int(stats.object_store_bytes_avail - stats.object_store_bytes_primary_copy)

    def _wait(self, ref: Any, unwanted: Event) -> tuple[Any, bytes | None]:
        from ray.exceptions import GetTimeoutError

        until = time.monotonic() + TAKE_TIMEOUT_S
        while True:
            try:
                [(data, metadata, _)] = self._core.get_objects([ref], int(_SLICE_S * 1000))
                return data, metadata
            except GetTimeoutError:
                if unwanted.is_set() or time.monotonic() > until:
                    raise

    def _dial_raylet(self) -> Any:
        import ray
        from ray._private.grpc_utils import init_grpc_channel
        from ray.core.generated import node_manager_pb2_grpc

        node = next(node for node in ray.nodes() if node["NodeID"] == self.node)
        channel = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
        return node_manager_pb2_grpc.NodeManagerServiceStub(channel)


def _checked_owner(place: Place) -> bytes:
    """The owner's address, rewritten from the fields that matter. Ray ends the process when it meets a malformed one.

    Raises TransferFailed.
    """
    from google.protobuf.message import DecodeError
    from ray.core.generated.common_pb2 import Address

    try:
        said = Address.FromString(place.owner)
        ipaddress.ip_address(said.ip_address)
    except (DecodeError, ValueError):
        said = Address()
    ids = (place.object_id, said.node_id, said.worker_id)
    if any(len(each) != _ID_BYTES for each in ids) or not 0 < said.port < 65536:
        raise TransferFailed("the place of a payload is no object of Ray's")
    owner = Address(node_id=said.node_id, worker_id=said.worker_id, ip_address=said.ip_address, port=said.port)
    return bytes(owner.SerializeToString())
