"""Every way Tandem says no, in one tree.

    TandemError
    ├── InvalidRequest       a field of a request is wrong; names the field and its limit
    ├── ModelNotFound        no joined worker serves that model
    ├── Overloaded           a bounded queue or pool is full; retry_after_ms says when to try again
    │   └── OutOfMemory      a worker's device had no room for the request's part of a step
    ├── DeadlineExceeded     the request's one deadline passed
    ├── Cancelled            the client left
    ├── Unavailable          nobody can serve this now (no worker has joined, all are draining)
    │   └── WorkerLost       a worker died while it held the request
    ├── TransferFailed       KV did not arrive whole and verified
    ├── Refused              two sides do not fit (another model, block size, version)
    ├── ConfigError          configuration or command line is wrong (entry points exit with 2)
    ├── ModelRefused         a model cannot be loaded, or would not be served exactly
    └── InternalError        a bug; details are in the log of the process, never in the message

Each class has one stable `code`. `CODES` maps codes to classes for the receiving side of a wire; the one table of gRPC
and HTTP statuses is in tandem/rpc.py.
"""

from __future__ import annotations

# Milliseconds after which what is full may have room again, where nothing better is known: it empties at the pace of
# whole requests. A service whose workers or router go, or have not come yet, is asked again as soon.
RETRY_AFTER_MS = 1000


class TandemError(Exception):
    """Base of all errors that Tandem raises on purpose. str(error) is one sentence for a person."""

    code = "internal"

    def __init__(self, message: str, *, field: str | None = None, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        # The request or configuration field at fault, if one is.
        self.field = field
        # When to try again, milliseconds; only where trying again makes sense.
        self.retry_after_ms = retry_after_ms


class InvalidRequest(TandemError):
    code = "invalid_request"


class ModelNotFound(TandemError):
    code = "model_not_found"


class Overloaded(TandemError):
    code = "overloaded"


class OutOfMemory(Overloaded):
    code = "out_of_memory"


class DeadlineExceeded(TandemError):
    code = "deadline_exceeded"


class Cancelled(TandemError):
    code = "cancelled"


class Unavailable(TandemError):
    code = "unavailable"


class WorkerLost(Unavailable):
    code = "worker_lost"


class TransferFailed(TandemError):
    code = "transfer_failed"


class Refused(TandemError):
    code = "refused"


class ConfigError(TandemError):
    code = "config"


class ModelRefused(TandemError):
    code = "model_refused"


class InternalError(TandemError):
    code = "internal"


def _tree(root: type[TandemError]) -> dict[str, type[TandemError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


CODES: dict[str, type[TandemError]] = {**_tree(TandemError), InternalError.code: InternalError}


def from_code(code: str, message: str, *, field: str | None = None, retry_after_ms: int | None = None) -> TandemError:
    """The error that a peer named on the wire; an unknown code becomes InternalError."""
    return CODES.get(code, InternalError)(message, field=field, retry_after_ms=retry_after_ms)
