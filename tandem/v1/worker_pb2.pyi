from tandem.v1 import common_pb2 as _common_pb2
from tandem.v1 import registry_pb2 as _registry_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EngineRequest(_message.Message):
    __slots__ = ("request_id", "attempt", "prompt_ids", "sampling", "cache_salt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _common_pb2.Sampling
    cache_salt: str
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., prompt_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_common_pb2.Sampling, _Mapping]] = ..., cache_salt: _Optional[str] = ...) -> None: ...

class TransferTarget(_message.Message):
    __slots__ = ("worker_id", "address", "reservation_id", "transport", "cached_tokens")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    address: str
    reservation_id: str
    transport: str
    cached_tokens: int
    def __init__(self, worker_id: _Optional[str] = ..., address: _Optional[str] = ..., reservation_id: _Optional[str] = ..., transport: _Optional[str] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("request", "target", "fingerprint")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    request: EngineRequest
    target: TransferTarget
    fingerprint: _registry_pb2.Fingerprint
    def __init__(self, request: _Optional[_Union[EngineRequest, _Mapping]] = ..., target: _Optional[_Union[TransferTarget, _Mapping]] = ..., fingerprint: _Optional[_Union[_registry_pb2.Fingerprint, _Mapping]] = ...) -> None: ...

class PrefillEvent(_message.Message):
    __slots__ = ("started", "first_token", "sealed")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    started: PrefillStarted
    first_token: FirstToken
    sealed: Sealed
    def __init__(self, started: _Optional[_Union[PrefillStarted, _Mapping]] = ..., first_token: _Optional[_Union[FirstToken, _Mapping]] = ..., sealed: _Optional[_Union[Sealed, _Mapping]] = ...) -> None: ...

class EmbedPromptRequest(_message.Message):
    __slots__ = ("request_id", "prompt_ids", "cache_salt", "pooling", "normalize", "fingerprint")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    NORMALIZE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    cache_salt: str
    pooling: _common_pb2.Pooling
    normalize: bool
    fingerprint: _registry_pb2.Fingerprint
    def __init__(self, request_id: _Optional[str] = ..., prompt_ids: _Optional[_Iterable[int]] = ..., cache_salt: _Optional[str] = ..., pooling: _Optional[_Union[_common_pb2.Pooling, str]] = ..., normalize: _Optional[bool] = ..., fingerprint: _Optional[_Union[_registry_pb2.Fingerprint, _Mapping]] = ...) -> None: ...

class EmbedPromptResponse(_message.Message):
    __slots__ = ("values", "cached_tokens")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    values: bytes
    cached_tokens: int
    def __init__(self, values: _Optional[bytes] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class PrefillStarted(_message.Message):
    __slots__ = ("queued_ms", "cached_tokens")
    QUEUED_MS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    queued_ms: float
    cached_tokens: int
    def __init__(self, queued_ms: _Optional[float] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("token", "finish_reason", "compute_ms")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_MS_FIELD_NUMBER: _ClassVar[int]
    token: _common_pb2.Token
    finish_reason: _common_pb2.FinishReason
    compute_ms: float
    def __init__(self, token: _Optional[_Union[_common_pb2.Token, _Mapping]] = ..., finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., compute_ms: _Optional[float] = ...) -> None: ...

class Sealed(_message.Message):
    __slots__ = ("summary", "after_first_token_ms")
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIRST_TOKEN_MS_FIELD_NUMBER: _ClassVar[int]
    summary: TransferSummary
    after_first_token_ms: float
    def __init__(self, summary: _Optional[_Union[TransferSummary, _Mapping]] = ..., after_first_token_ms: _Optional[float] = ...) -> None: ...

class TransferSummary(_message.Message):
    __slots__ = ("bytes", "frames", "transfer_ms", "hidden_ms")
    BYTES_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_MS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_MS_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    frames: int
    transfer_ms: float
    hidden_ms: float
    def __init__(self, bytes: _Optional[int] = ..., frames: _Optional[int] = ..., transfer_ms: _Optional[float] = ..., hidden_ms: _Optional[float] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("request", "subscriber_id", "lease_ms", "transport", "deadline_ms")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    SUBSCRIBER_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    request: EngineRequest
    subscriber_id: str
    lease_ms: int
    transport: str
    deadline_ms: int
    def __init__(self, request: _Optional[_Union[EngineRequest, _Mapping]] = ..., subscriber_id: _Optional[str] = ..., lease_ms: _Optional[int] = ..., transport: _Optional[str] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class Reservation(_message.Message):
    __slots__ = ("reservation_id", "cached_tokens", "queued_ms", "counted_from")
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_MS_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FROM_FIELD_NUMBER: _ClassVar[int]
    reservation_id: str
    cached_tokens: int
    queued_ms: float
    counted_from: int
    def __init__(self, reservation_id: _Optional[str] = ..., cached_tokens: _Optional[int] = ..., queued_ms: _Optional[float] = ..., counted_from: _Optional[int] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("reservation_ids", "lease_ms")
    RESERVATION_IDS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    reservation_ids: _containers.RepeatedScalarFieldContainer[str]
    lease_ms: int
    def __init__(self, reservation_ids: _Optional[_Iterable[str]] = ..., lease_ms: _Optional[int] = ...) -> None: ...

class RenewResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SubscribeRequest(_message.Message):
    __slots__ = ("subscriber_id",)
    SUBSCRIBER_ID_FIELD_NUMBER: _ClassVar[int]
    subscriber_id: str
    def __init__(self, subscriber_id: _Optional[str] = ...) -> None: ...

class TokenBatch(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[RequestTokens]
    def __init__(self, requests: _Optional[_Iterable[_Union[RequestTokens, _Mapping]]] = ...) -> None: ...

class RequestTokens(_message.Message):
    __slots__ = ("request_id", "attempt", "position", "tokens", "finish_reason", "failure", "decode_gap_ms")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    DECODE_GAP_MS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    position: int
    tokens: _containers.RepeatedCompositeFieldContainer[_common_pb2.Token]
    finish_reason: _common_pb2.FinishReason
    failure: _common_pb2.Failure
    decode_gap_ms: float
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., position: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[_common_pb2.Token, _Mapping]]] = ..., finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., failure: _Optional[_Union[_common_pb2.Failure, _Mapping]] = ..., decode_gap_ms: _Optional[float] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("request_id", "attempt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CheckIntegrityRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
