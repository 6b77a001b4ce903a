"""Between the values of tandem/types.py and the messages of tandem/v1. Decoding validates: a bad field raises."""

from __future__ import annotations

from dataclasses import asdict

from tandem import errors, prefix, types
from tandem.timeline import Phase, Timeline
from tandem.v1 import common_pb2, generation_pb2, registry_pb2, worker_pb2

_ROLES = {types.Role.PREFILL: registry_pb2.ROLE_PREFILL, types.Role.DECODE: registry_pb2.ROLE_DECODE}
_ROLES_BACK = {value: key for key, value in _ROLES.items()}
_REASONS = {
    types.FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    types.FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    types.FinishReason.ABORT: common_pb2.FINISH_REASON_ABORT,
    types.FinishReason.ERROR: common_pb2.FINISH_REASON_ERROR,
}
_REASONS_BACK = {value: key for key, value in _REASONS.items()}
# A field of a protobuf message whose number is below 16, beside its bytes: tag, and length or value, at most.
_FIELD_BYTES = 6
_POOLINGS = {types.Pooling.LAST: common_pb2.POOLING_LAST, types.Pooling.MEAN: common_pb2.POOLING_MEAN}


def roles_to_wire(roles: frozenset[types.Role]) -> list[registry_pb2.Role]:
    return [_ROLES[role] for role in sorted(roles)]


def roles_from_wire(roles: list[registry_pb2.Role]) -> frozenset[types.Role]:
    """Roles this version does not know are left out."""
    return frozenset(_ROLES_BACK[role] for role in roles if role in _ROLES_BACK)


def reason_to_wire(reason: types.FinishReason | None) -> common_pb2.FinishReason:
    return common_pb2.FINISH_REASON_UNSPECIFIED if reason is None else _REASONS[reason]


def reason_from_wire(reason: common_pb2.FinishReason) -> types.FinishReason | None:
    """None: not finished."""
    return _REASONS_BACK.get(reason)


def sampling_to_wire(params: types.SamplingParams) -> common_pb2.Sampling:
    return common_pb2.Sampling(
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=dict(params.logit_bias),
        seed=params.seed,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        logprobs=params.logprobs,
    )


def sampling_from_wire(message: common_pb2.Sampling) -> types.SamplingParams:
    """Raises InvalidRequest. Every field counts as sent, zeros too: clients fill in the defaults."""
    return types.SamplingParams(
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=dict(message.logit_bias),
        seed=message.seed if message.HasField("seed") else None,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
    )


def request_to_wire(request: types.EngineRequest) -> worker_pb2.EngineRequest:
    return worker_pb2.EngineRequest(
        request_id=request.request_id,
        attempt=request.attempt,
        prompt_ids=request.prompt_ids,
        sampling=sampling_to_wire(request.sampling),
        cache_salt=request.cache_salt,
    )


def request_from_wire(message: worker_pb2.EngineRequest) -> types.EngineRequest:
    return types.EngineRequest(
        request_id=message.request_id,
        attempt=message.attempt,
        prompt_ids=tuple(message.prompt_ids),
        sampling=sampling_from_wire(message.sampling),
        cache_salt=message.cache_salt,
    )


def token_to_wire(token: types.Token) -> common_pb2.Token:
    message = common_pb2.Token(id=token.id)
    if token.logprob is not None:
        message.logprob = token.logprob
    for token_id, logprob in token.top_logprobs:
        message.top_logprobs.add(token_id=token_id, logprob=logprob)
    return message


def token_from_wire(message: common_pb2.Token) -> types.Token:
    top = message.top_logprobs
    return types.Token(
        message.id,
        message.logprob if message.HasField("logprob") else None,
        tuple((entry.token_id, entry.logprob) for entry in top) if top else (),
    )


def failure_to_wire(error: errors.TandemError) -> common_pb2.Failure:
    return common_pb2.Failure(code=error.code, message=error.message)


def failure_from_wire(message: common_pb2.Failure) -> errors.TandemError:
    return errors.from_code(message.code, message.message)


def fingerprint_to_wire(fingerprint: types.Fingerprint) -> registry_pb2.Fingerprint:
    return registry_pb2.Fingerprint(**asdict(fingerprint))


def fingerprint_from_wire(message: registry_pb2.Fingerprint) -> types.Fingerprint:
    return types.Fingerprint(**{name: getattr(message, name) for name in types.Fingerprint.__dataclass_fields__})


def model_to_wire(model: types.ModelInfo) -> registry_pb2.ModelInfo:
    return registry_pb2.ModelInfo(
        name=model.name,
        vocab_size=model.vocab_size,
        max_model_len=model.max_model_len,
        eos_token_ids=model.eos_token_ids,
        fingerprint=fingerprint_to_wire(model.fingerprint),
        hidden_size=model.hidden_size,
    )


def model_from_wire(message: registry_pb2.ModelInfo) -> types.ModelInfo:
    return types.ModelInfo(
        name=message.name,
        vocab_size=message.vocab_size,
        max_model_len=message.max_model_len,
        eos_token_ids=tuple(message.eos_token_ids),
        fingerprint=fingerprint_from_wire(message.fingerprint),
        hidden_size=message.hidden_size,
    )


def embed_params_to_wire(params: types.EmbedParams) -> tuple[common_pb2.Pooling, bool]:
    """The fields pooling and normalize."""
    return _POOLINGS[params.pooling], params.normalize


def embed_params_from_wire(pooling: common_pb2.Pooling, normalize: bool) -> types.EmbedParams:
    """Raises InvalidRequest for a pooling that this version does not know."""
    if pooling == common_pb2.POOLING_UNSPECIFIED:
        return types.EmbedParams(normalize=normalize)
    for known, value in _POOLINGS.items():
        if value == pooling:
            return types.EmbedParams(known, normalize)
    raise errors.InvalidRequest(f"pooling must be last or mean, not {pooling}", field="pooling")


def embed_response_bytes(count: int, width: int) -> int:
    """At most so many bytes are an EmbedResponse of `count` vectors: their numbers, and what frames them."""
    return count * (4 * width + 2 * _FIELD_BYTES) + 4 * _FIELD_BYTES


def cache_changes_to_wire(changes: prefix.CacheChanges) -> registry_pb2.PrefixCacheChanges:
    return registry_pb2.PrefixCacheChanges(
        reset=changes.reset, lost=b"".join(changes.lost), gained=b"".join(changes.gained)
    )


def cache_changes_from_wire(message: registry_pb2.PrefixCacheChanges) -> prefix.CacheChanges:
    """Raises Refused for names that are cut short, or more of them than one heartbeat may carry."""
    if (len(message.lost) + len(message.gained)) > prefix.MAX_CHANGES * prefix.NAME_BYTES:
        raise errors.Refused(f"a heartbeat may carry at most {prefix.MAX_CHANGES} changes of the prefix cache")
    return prefix.CacheChanges(message.reset, _names(message.lost), _names(message.gained))


def _names(joined: bytes) -> tuple[bytes, ...]:
    size = prefix.NAME_BYTES
    if len(joined) % size:
        raise errors.Refused(f"names of cached blocks have {size} bytes; a heartbeat brought {len(joined)} in all")
    return tuple(joined[start : start + size] for start in range(0, len(joined), size))


def report_to_wire(report: types.RequestReport) -> generation_pb2.Timeline:
    marks = sorted(report.timeline.marks.items(), key=lambda mark: list(Phase).index(mark[0]))
    return generation_pb2.Timeline(
        marks=[generation_pb2.PhaseMark(phase=phase, at_ms=at_ms) for phase, at_ms in marks],
        kv_bytes=report.kv_bytes,
        kv_frames=report.kv_frames,
        kv_reused_tokens=report.kv_reused_tokens,
        kv_transfer_ms=report.kv_transfer_ms,
        kv_hidden_ms=report.kv_hidden_ms,
        transport=report.transport,
        prefill_worker=report.prefill_worker,
        decode_worker=report.decode_worker,
    )


def report_from_wire(message: generation_pb2.Timeline) -> types.RequestReport:
    return types.RequestReport(
        timeline=Timeline({Phase(mark.phase): mark.at_ms for mark in message.marks}),
        kv_bytes=message.kv_bytes,
        kv_frames=message.kv_frames,
        kv_reused_tokens=message.kv_reused_tokens,
        kv_transfer_ms=message.kv_transfer_ms,
        kv_hidden_ms=message.kv_hidden_ms,
        transport=message.transport,
        prefill_worker=message.prefill_worker,
        decode_worker=message.decode_worker,
    )


def event_to_wire(event: types.Event) -> generation_pb2.GenerateEvent:
    match event:
        case types.Accepted():
            accepted = generation_pb2.Accepted(request_id=event.request_id, prompt_tokens=event.prompt_tokens)
            return generation_pb2.GenerateEvent(accepted=accepted)
        case types.Delta():
            message = generation_pb2.GenerateEvent()
            delta = message.delta
            delta.choice, delta.text = event.choice, event.text
            delta.tokens.extend(map(token_to_wire, event.tokens))
            if event.reason is not None:
                delta.reason, delta.stop = reason_to_wire(event.reason), event.stop or ""
            return message
        case types.ChoiceFinished():
            return generation_pb2.GenerateEvent(choice_finished=_finished_to_wire(event))
        case types.Completed():
            return generation_pb2.GenerateEvent(
                completed=generation_pb2.Completed(usage=generation_pb2.Usage(**asdict(event.usage)))
            )


def _finished_to_wire(event: types.ChoiceFinished) -> generation_pb2.ChoiceFinished:
    return generation_pb2.ChoiceFinished(
        choice=event.choice,
        reason=reason_to_wire(event.reason),
        timeline=report_to_wire(event.report),
        output_tokens=event.output_tokens,
        stop=event.stop or "",
    )


def event_from_wire(message: generation_pb2.GenerateEvent) -> types.Event:
    """Raises InternalError for an event that this version does not know."""
    match message.WhichOneof("event"):
        case "accepted":
            return types.Accepted(message.accepted.request_id, message.accepted.prompt_tokens)
        case "delta":
            delta, tokens = message.delta, tuple(map(token_from_wire, message.delta.tokens))
            return types.Delta(delta.choice, tokens, delta.text, reason_from_wire(delta.reason), delta.stop or None)
        case "choice_finished":
            return _finished_from_wire(message.choice_finished)
        case "completed":
            usage = message.completed.usage
            return types.Completed(types.Usage(usage.prompt_tokens, usage.output_tokens, usage.cached_prompt_tokens))
        case other:
            raise errors.InternalError(f"unknown event {other} from the router")


def _finished_from_wire(message: generation_pb2.ChoiceFinished) -> types.ChoiceFinished:
    return types.ChoiceFinished(
        choice=message.choice,
        reason=reason_from_wire(message.reason) or types.FinishReason.ERROR,
        output_tokens=message.output_tokens,
        report=report_from_wire(message.timeline),
        stop=message.stop or None,
    )
