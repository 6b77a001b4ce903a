from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_PREFILL: _ClassVar[Role]
    ROLE_DECODE: _ClassVar[Role]
ROLE_UNSPECIFIED: Role
ROLE_PREFILL: Role
ROLE_DECODE: Role

class Fingerprint(_message.Message):
    __slots__ = ("config_hash", "weights_hash", "dtype", "block_size", "num_layers", "num_kv_heads", "head_dim", "layout")
    CONFIG_HASH_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_HASH_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    config_hash: str
    weights_hash: str
    dtype: str
    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    layout: int
    def __init__(self, config_hash: _Optional[str] = ..., weights_hash: _Optional[str] = ..., dtype: _Optional[str] = ..., block_size: _Optional[int] = ..., num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., layout: _Optional[int] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "vocab_size", "max_model_len", "eos_token_ids", "fingerprint", "hidden_size")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    fingerprint: Fingerprint
    hidden_size: int
    def __init__(self, name: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., fingerprint: _Optional[_Union[Fingerprint, _Mapping]] = ..., hidden_size: _Optional[int] = ...) -> None: ...

class Transport(_message.Message):
    __slots__ = ("name", "domain", "node", "rank", "least_kv_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    LEAST_KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    domain: str
    node: str
    rank: int
    least_kv_bytes: int
    def __init__(self, name: _Optional[str] = ..., domain: _Optional[str] = ..., node: _Optional[str] = ..., rank: _Optional[int] = ..., least_kv_bytes: _Optional[int] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("worker_id", "address", "roles", "model", "version", "total_blocks", "transports", "pid", "device", "prefix_cache", "instance", "playable")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ROLES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PREFIX_CACHE_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    PLAYABLE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    address: str
    roles: _containers.RepeatedScalarFieldContainer[Role]
    model: ModelInfo
    version: str
    total_blocks: int
    transports: _containers.RepeatedCompositeFieldContainer[Transport]
    pid: int
    device: str
    prefix_cache: bool
    instance: str
    playable: _containers.RepeatedScalarFieldContainer[Role]
    def __init__(self, worker_id: _Optional[str] = ..., address: _Optional[str] = ..., roles: _Optional[_Iterable[_Union[Role, str]]] = ..., model: _Optional[_Union[ModelInfo, _Mapping]] = ..., version: _Optional[str] = ..., total_blocks: _Optional[int] = ..., transports: _Optional[_Iterable[_Union[Transport, _Mapping]]] = ..., pid: _Optional[int] = ..., device: _Optional[str] = ..., prefix_cache: _Optional[bool] = ..., instance: _Optional[str] = ..., playable: _Optional[_Iterable[_Union[Role, str]]] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("free_blocks", "queued_prompt_tokens", "running_decodes", "waiting_prefills", "reservations", "waiting_reservations", "kv_sent", "kv_received", "steps", "prefix_hit_tokens", "prefix_query_tokens", "quarantined_blocks", "out_of_memory")
    class KvSentEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: KVTraffic
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[KVTraffic, _Mapping]] = ...) -> None: ...
    class KvReceivedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: KVTraffic
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[KVTraffic, _Mapping]] = ...) -> None: ...
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_DECODES_FIELD_NUMBER: _ClassVar[int]
    WAITING_PREFILLS_FIELD_NUMBER: _ClassVar[int]
    RESERVATIONS_FIELD_NUMBER: _ClassVar[int]
    WAITING_RESERVATIONS_FIELD_NUMBER: _ClassVar[int]
    KV_SENT_FIELD_NUMBER: _ClassVar[int]
    KV_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_QUERY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    OUT_OF_MEMORY_FIELD_NUMBER: _ClassVar[int]
    free_blocks: int
    queued_prompt_tokens: int
    running_decodes: int
    waiting_prefills: int
    reservations: int
    waiting_reservations: int
    kv_sent: _containers.MessageMap[str, KVTraffic]
    kv_received: _containers.MessageMap[str, KVTraffic]
    steps: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    quarantined_blocks: int
    out_of_memory: int
    def __init__(self, free_blocks: _Optional[int] = ..., queued_prompt_tokens: _Optional[int] = ..., running_decodes: _Optional[int] = ..., waiting_prefills: _Optional[int] = ..., reservations: _Optional[int] = ..., waiting_reservations: _Optional[int] = ..., kv_sent: _Optional[_Mapping[str, KVTraffic]] = ..., kv_received: _Optional[_Mapping[str, KVTraffic]] = ..., steps: _Optional[int] = ..., prefix_hit_tokens: _Optional[int] = ..., prefix_query_tokens: _Optional[int] = ..., quarantined_blocks: _Optional[int] = ..., out_of_memory: _Optional[int] = ...) -> None: ...

class KVTraffic(_message.Message):
    __slots__ = ("transfers", "failures", "bytes", "frames", "seconds", "hidden_seconds", "corrupt_frames")
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_FRAMES_FIELD_NUMBER: _ClassVar[int]
    transfers: int
    failures: int
    bytes: int
    frames: int
    seconds: float
    hidden_seconds: float
    corrupt_frames: int
    def __init__(self, transfers: _Optional[int] = ..., failures: _Optional[int] = ..., bytes: _Optional[int] = ..., frames: _Optional[int] = ..., seconds: _Optional[float] = ..., hidden_seconds: _Optional[float] = ..., corrupt_frames: _Optional[int] = ...) -> None: ...

class PrefixCacheChanges(_message.Message):
    __slots__ = ("reset", "lost", "gained")
    RESET_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    GAINED_FIELD_NUMBER: _ClassVar[int]
    reset: bool
    lost: bytes
    gained: bytes
    def __init__(self, reset: _Optional[bool] = ..., lost: _Optional[bytes] = ..., gained: _Optional[bytes] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("hello", "load", "draining", "prefix_cache", "number")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    PREFIX_CACHE_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    load: Load
    draining: bool
    prefix_cache: PrefixCacheChanges
    number: int
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., draining: _Optional[bool] = ..., prefix_cache: _Optional[_Union[PrefixCacheChanges, _Mapping]] = ..., number: _Optional[int] = ...) -> None: ...

class Directive(_message.Message):
    __slots__ = ("welcome", "drain", "set_roles", "dismiss")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    SET_ROLES_FIELD_NUMBER: _ClassVar[int]
    DISMISS_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    drain: Drain
    set_roles: SetRoles
    dismiss: Dismiss
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ..., set_roles: _Optional[_Union[SetRoles, _Mapping]] = ..., dismiss: _Optional[_Union[Dismiss, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("heartbeat_interval_ms",)
    HEARTBEAT_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    heartbeat_interval_ms: int
    def __init__(self, heartbeat_interval_ms: _Optional[int] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Dismiss(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SetRoles(_message.Message):
    __slots__ = ("roles",)
    ROLES_FIELD_NUMBER: _ClassVar[int]
    roles: _containers.RepeatedScalarFieldContainer[Role]
    def __init__(self, roles: _Optional[_Iterable[_Union[Role, str]]] = ...) -> None: ...

class DrainWorkerRequest(_message.Message):
    __slots__ = ("worker_id",)
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    def __init__(self, worker_id: _Optional[str] = ...) -> None: ...

class DrainWorkerResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SetWorkerRolesRequest(_message.Message):
    __slots__ = ("worker_id", "roles")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLES_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    roles: _containers.RepeatedScalarFieldContainer[Role]
    def __init__(self, worker_id: _Optional[str] = ..., roles: _Optional[_Iterable[_Union[Role, str]]] = ...) -> None: ...

class SetWorkerRolesResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Integrity(_message.Message):
    __slots__ = ("ok", "referenced_blocks", "reservations", "quarantined_blocks", "live_sequences", "problem")
    OK_FIELD_NUMBER: _ClassVar[int]
    REFERENCED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RESERVATIONS_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LIVE_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    ok: bool
    referenced_blocks: int
    reservations: int
    quarantined_blocks: int
    live_sequences: int
    problem: str
    def __init__(self, ok: _Optional[bool] = ..., referenced_blocks: _Optional[int] = ..., reservations: _Optional[int] = ..., quarantined_blocks: _Optional[int] = ..., live_sequences: _Optional[int] = ..., problem: _Optional[str] = ...) -> None: ...
