"""The RouterAdmin service: what an operator tells a joined worker."""

from __future__ import annotations

from typing import Any

from router.pool.registry import Registry
from tandem.v1 import registry_pb2, registry_pb2_grpc
from tandem.wire import roles_from_wire


class RouterAdminService(registry_pb2_grpc.RouterAdminServicer):
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def DrainWorker(
        self, request: registry_pb2.DrainWorkerRequest, _context: Any
    ) -> registry_pb2.DrainWorkerResponse:
        self._registry.drain(request.worker_id)
        return registry_pb2.DrainWorkerResponse()

    async def SetWorkerRoles(
        self, request: registry_pb2.SetWorkerRolesRequest, _context: Any
    ) -> registry_pb2.SetWorkerRolesResponse:
        self._registry.set_roles(request.worker_id, roles_from_wire(list(request.roles)))
        return registry_pb2.SetWorkerRolesResponse()
