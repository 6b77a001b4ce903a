"""The SDK: `AsyncClient` and `Client` speak gRPC to a router. No torch."""

from tandem.client.aio import AsyncClient, AsyncGeneration
from tandem.client.completion import Choice, Completion
from tandem.client.embedding import Embeddings
from tandem.client.request import SamplingFields
from tandem.client.status import Integrity, LiveRequest, Load, ServiceStatus, WorkerState
from tandem.client.sync import Client, Generation

__all__ = [
    "AsyncClient",
    "AsyncGeneration",
    "Choice",
    "Client",
    "Completion",
    "Embeddings",
    "Generation",
    "Integrity",
    "LiveRequest",
    "Load",
    "SamplingFields",
    "ServiceStatus",
    "WorkerState",
]
