"""Which workers serve a request: those that can, and of them the policy's choice."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

from router.policy.base import Demand, Placement, Policy, WorkerView, blocks_for
from router.policy.cache_aware import CacheAware
from tandem.errors import RETRY_AFTER_MS, ConfigError, InternalError, InvalidRequest, Unavailable
from tandem.types import Role, shown

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")

# What router.policy may say, besides module:Class.
POLICIES: Mapping[str, Callable[[], Policy]] = MappingProxyType({"cache_aware": CacheAware})
# Why nobody plays a role now, where more is known than that nobody has joined: how a sentence goes on that begins with
# "no decode worker". Clients read it, so it names nobody.
Absent = Mapping[Role, str]
NEVER_CAME = "has joined"
_UNKNOWN: Absent = MappingProxyType({})


def load_policy(name: str) -> Policy:
    """name: as in router.policy. Raises ConfigError."""
    if name in POLICIES:
        return POLICIES[name]()
    module, colon, kind = name.partition(":")
    if not colon:
        known = ", ".join(POLICIES)
        words = f"there is no policy {shown(name)}: say one of {known}, or module:Class for your own"
        raise ConfigError(f"router.policy: {words}", field="router.policy")
    try:
        policy = getattr(importlib.import_module(module), kind)()
    except Exception as error:  # whatever is wrong with the name, or with what its author wrote
        words = f"cannot make a policy of {shown(name)}: {type(error).__name__}: {error}"
        raise ConfigError(f"router.policy: {words}", field="router.policy") from error
    if not isinstance(policy, Policy):
        words = f"{shown(name)} lacks choose_pair or choose_prefill (router/policy/base.py says what they are)"
        raise ConfigError(f"router.policy: {words}", field="router.policy")
    return policy


class Placer:
    """Offers the workers that can serve a request to the policy, and checks what it answers."""

    def __init__(self, name: str) -> None:
        """name: as in router.policy. Raises ConfigError."""
        self._policy = load_policy(name)
        self._name = name

    def choose(self, workers: Sequence[WorkerView], demand: Demand, absent: Absent = _UNKNOWN) -> Placement:
        """Raises Unavailable when a role has no worker now, InvalidRequest when no joined worker could ever hold the
        request, InternalError when the policy fails.
        """
        prefills = _able(workers, Role.PREFILL, demand.prompt_tokens, absent)
        decodes = _able(workers, Role.DECODE, demand.kv_tokens, absent)
        chosen = self._ask(lambda: self._policy.choose_pair(prefills, decodes, demand))
        if not isinstance(chosen, Placement):
            raise self._failed(f"answered {shown(chosen)}, which is no Placement")
        self._offered(chosen.prefill, Role.PREFILL, prefills, workers)
        self._offered(chosen.decode, Role.DECODE, decodes, workers)
        return chosen

    def choose_prefill(
        self, workers: Sequence[WorkerView], prompt_tokens: int, absent: Absent = _UNKNOWN
    ) -> WorkerView:
        """Where a prompt is computed, whoever decodes, if anybody does. Raises as `choose` does."""
        prefills = _able(workers, Role.PREFILL, prompt_tokens, absent)
        chosen = self._ask(lambda: self._policy.choose_prefill(prefills, prompt_tokens))
        return self._offered(chosen, Role.PREFILL, prefills, workers)

    def _ask(self, method: Callable[[], Answer]) -> Answer:
        try:
            return method()
        except Exception as error:
            raise self._failed(f"raised {type(error).__name__}; the router's log has the details", error) from None

    def _offered(
        self, worker_id: str, role: Role, offered: Sequence[WorkerView], workers: Sequence[WorkerView]
    ) -> WorkerView:
        for worker in offered:
            if worker.worker_id == worker_id:
                return worker
        other = next((worker for worker in workers if worker.worker_id == worker_id), None)
        if other is None:
            why = "which is not there"
        elif role not in other.roles:
            why = f"which does not play {role}"
        else:
            why = "which is draining" if other.draining else "which is too small for the request"
        raise self._failed(f"chose {shown(worker_id)} as the {role} worker, {why}")

    def _failed(self, words: str, cause: Exception | None = None) -> InternalError:
        """Logged here: the HTTP door tells a client nothing but that there was an error."""
        message = f"the routing policy {self._name} {words} (router.policy)"
        log.error("%s", message, exc_info=cause)
        return InternalError(message)


def _able(workers: Sequence[WorkerView], role: Role, tokens: int, absent: Absent) -> list[WorkerView]:
    """The workers that the role may be placed on. Raises Unavailable or InvalidRequest when there is none."""
    playing = [worker for worker in workers if role in worker.roles]
    if not playing:
        raise Unavailable(f"no {role} worker {absent.get(role, NEVER_CAME)}", retry_after_ms=RETRY_AFTER_MS)
    large = [worker for worker in playing if blocks_for(tokens, worker.block_size) <= worker.total_blocks]
    if not large:
        limit = max(worker.total_blocks * worker.block_size for worker in playing)
        raise InvalidRequest(
            f"the request needs room for {tokens} tokens; the largest {role} worker holds {limit}",
            field="prompt" if role is Role.PREFILL else "max_tokens",
        )
    ready = [worker for worker in large if not worker.draining]
    if not ready:
        words = f"every {role} worker that could hold the request is draining"
        raise Unavailable(words, retry_after_ms=RETRY_AFTER_MS)
    return ready
