from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

import tandem
from router.pool.registry import Registry, Silent
from router.pool.worker import MAX_DIRECTIVES, Worker
from tandem.config import RouterConfig
from tandem.errors import InvalidRequest, Overloaded, Refused, TandemError, Unavailable, WorkerLost
from tandem.prefix import CacheChanges, chain_hashes
from tandem.types import Fingerprint, ModelInfo, Role
from tandem.v1 import registry_pb2
from tandem.wire import cache_changes_to_wire, model_to_wire, roles_from_wire, roles_to_wire

MODEL = ModelInfo("tiny", 384, 512, (0,), Fingerprint("c", "w", "float32", 16, 2, 2, 8, 1), 128)
BOTH = frozenset({Role.PREFILL, Role.DECODE})
ONLY_PREFILL = frozenset({Role.PREFILL})


def heartbeat(
    worker_id: str = "w", roles: frozenset[Role] = BOTH, playable: frozenset[Role] = BOTH
) -> registry_pb2.Heartbeat:
    hello = registry_pb2.Hello(
        worker_id=worker_id,
        address="127.0.0.1:1",
        roles=roles_to_wire(roles),
        playable=roles_to_wire(playable),
        model=model_to_wire(MODEL),
        version=tandem.__version__,
        total_blocks=10,
        prefix_cache=True,
        instance="made by the process",
    )
    return registry_pb2.Heartbeat(hello=hello, load=registry_pb2.Load(free_blocks=10, queued_prompt_tokens=3))


@pytest.fixture
async def registry() -> AsyncIterator[Registry]:
    registry = Registry(RouterConfig(), MODEL.name)
    yield registry
    for worker in registry.workers:
        registry.remove(worker, Unavailable("the test is over"))
        await worker.link.close()


@pytest.fixture
async def worker(registry: Registry) -> Worker:
    return registry.admit(heartbeat())


async def test_drain_sends_the_directive_and_places_nothing_more(registry: Registry, worker: Worker) -> None:
    registry.drain("w")
    assert worker.directives.get_nowait().HasField("drain")
    assert worker.view().draining
    worker.heartbeat(registry_pb2.Heartbeat(draining=False))
    assert worker.view().draining, "a heartbeat that left before the directive came changes nothing"


async def test_a_draining_worker_is_dismissed_once_nothing_depends_on_it(worker: Worker) -> None:
    """What was placed before it drained may still be on its way: its own pools cannot tell."""
    worker.attach("live", Role.DECODE, lambda error: None)
    worker.heartbeat(registry_pb2.Heartbeat(draining=True))
    assert worker.directives.empty()
    worker.detach("live", Role.DECODE)
    worker.heartbeat(registry_pb2.Heartbeat(draining=True))
    assert worker.directives.get_nowait().HasField("dismiss")
    assert worker.directives.empty(), "said once"


async def test_a_worker_that_does_not_drain_is_not_dismissed(worker: Worker) -> None:
    worker.attach("live", Role.DECODE, lambda error: None)
    worker.detach("live", Role.DECODE)
    worker.heartbeat(registry_pb2.Heartbeat())
    assert worker.directives.empty()


async def test_set_roles_drops_at_once_and_adds_when_the_worker_says_so(registry: Registry) -> None:
    worker = registry.admit(heartbeat(roles=ONLY_PREFILL))
    registry.set_roles("w", frozenset({Role.DECODE}))
    directive = worker.directives.get_nowait()
    assert roles_from_wire(list(directive.set_roles.roles)) == {Role.DECODE}
    assert worker.roles == frozenset()
    worker.heartbeat(heartbeat(roles=frozenset({Role.DECODE})))
    assert worker.roles == {Role.DECODE}
    assert worker.view().roles == frozenset(), "its token stream is not open"


@pytest.mark.usefixtures("worker")
async def test_orders_that_make_no_sense(registry: Registry) -> None:
    with pytest.raises(InvalidRequest, match="no worker 'x' has joined; joined: w"):
        registry.drain("x")
    with pytest.raises(InvalidRequest, match="at least one role"):
        registry.set_roles("w", frozenset())


async def test_a_role_that_its_process_has_no_service_for_is_refused(registry: Registry) -> None:
    worker = registry.admit(heartbeat(roles=ONLY_PREFILL, playable=ONLY_PREFILL))
    with pytest.raises(InvalidRequest, match="worker w cannot play decode: its process has services for prefill"):
        registry.set_roles("w", BOTH)
    assert worker.roles == ONLY_PREFILL
    assert worker.directives.empty()


async def test_directives_are_bounded(registry: Registry, worker: Worker) -> None:
    for _ in range(MAX_DIRECTIVES):
        registry.drain("w")
    with pytest.raises(Overloaded):
        registry.drain("w")


async def test_the_view_counts_what_was_placed_since_the_heartbeat(worker: Worker) -> None:
    worker.books.queued.place("r", 20)
    worker.books.promised.place("r", 4)
    view = worker.view()
    assert (view.queued_prompt_tokens, view.free_blocks, view.live_requests) == (23, 6, 1)
    worker.books.queued.taken("r", 2)
    worker.books.promised.taken("r", 2)
    load = registry_pb2.Load(free_blocks=5, queued_prompt_tokens=20, reservations=1)
    worker.heartbeat(registry_pb2.Heartbeat(load=load, number=2))
    view = worker.view()
    assert (view.queued_prompt_tokens, view.free_blocks, view.live_requests) == (20, 5, 1)


async def test_a_lost_worker_fails_what_is_live_on_it_once(registry: Registry, worker: Worker) -> None:
    failures: list[TandemError] = []
    worker.attach("live", Role.PREFILL, failures.append)
    worker.attach("gone", Role.DECODE, failures.append)
    worker.detach("gone", Role.DECODE)
    registry.remove(worker, Unavailable("its Join stream broke"))
    registry.remove(worker, Unavailable("again"))
    assert [str(error) for error in failures] == ["prefill worker w was lost: its Join stream broke"]
    assert isinstance(failures[0], WorkerLost)
    assert registry.workers == registry.snapshot() == ()


async def test_nothing_is_placed_on_a_worker_that_is_not_connected(registry: Registry, worker: Worker) -> None:
    assert registry.workers == (worker,)
    assert registry.snapshot() == ()
    assert registry.absent() == dict.fromkeys(Role, "is ready yet: one is joining")


@pytest.mark.parametrize(
    ("cause", "drains", "words"),
    [
        (Unavailable("its Join stream broke"), False, "is there: the last one was lost"),
        (Silent("no heartbeat for 4 s"), False, "is there: the last one fell silent, frozen or cut off"),
        (Unavailable("it left"), True, "is there: the last one has left"),
    ],
)
async def test_what_became_of_the_last_worker_is_known(
    registry: Registry, cause: TandemError, drains: bool, words: str
) -> None:
    with pytest.raises(Unavailable, match="no worker has joined, so no model is served"):
        registry.served()
    prefill = registry.admit(heartbeat("p", ONLY_PREFILL))
    if drains:
        registry.drain("p")
    registry.remove(prefill, cause)
    assert registry.absent() == {Role.PREFILL: words}
    with pytest.raises(Unavailable, match=f"no worker {words}, so no model is served"):
        registry.served()
    registry.admit(heartbeat("other"))
    assert registry.absent() == dict.fromkeys(Role, "is ready yet: one is joining")
    assert registry.served() == MODEL


async def test_the_view_knows_which_leading_blocks_the_worker_has(registry: Registry) -> None:
    names = chain_hashes(None, list(range(48)), 16)
    first = heartbeat()
    first.prefix_cache.CopyFrom(cache_changes_to_wire(CacheChanges(reset=True, gained=tuple(names[:2]))))
    worker = registry.admit(first)
    view = worker.view(names)
    assert (view.cached_blocks, view.cache_size) == (2, 2)
    assert worker.view().cached_blocks == 0
    lost = cache_changes_to_wire(CacheChanges(lost=(names[1],)))
    worker.heartbeat(registry_pb2.Heartbeat(prefix_cache=lost))
    assert worker.view(names).cached_blocks == 1


async def test_a_worker_that_joins_again_starts_with_an_empty_index(registry: Registry) -> None:
    first = heartbeat()
    first.prefix_cache.CopyFrom(cache_changes_to_wire(CacheChanges(gained=tuple(chain_hashes(None, [1] * 16, 16)))))
    assert len(registry.admit(first).reported.prefixes) == 1
    assert len(registry.admit(heartbeat()).reported.prefixes) == 0


async def test_a_worker_with_broken_names_is_refused(registry: Registry) -> None:
    first = heartbeat()
    first.prefix_cache.gained = b"short"
    with pytest.raises(Refused):
        registry.admit(first)
    assert registry.workers == ()


async def test_a_refused_worker_takes_nobody_else_out(registry: Registry, worker: Worker) -> None:
    again = heartbeat()
    again.prefix_cache.gained = b"short"
    with pytest.raises(Refused):
        registry.admit(again)
    assert registry.workers == (worker,)


async def test_a_later_hello_changes_roles_and_nothing_else(worker: Worker) -> None:
    later = heartbeat("another", roles=ONLY_PREFILL)
    later.hello.address = "127.0.0.1:2"
    worker.heartbeat(later)
    assert worker.roles == ONLY_PREFILL
    assert (worker.id, worker.reported.hello.worker_id, worker.reported.hello.address) == ("w", "w", "127.0.0.1:1")
    later.hello.ClearField("roles")
    worker.heartbeat(later)
    assert worker.roles == ONLY_PREFILL


async def test_nothing_is_expected_of_a_worker_without_a_prefix_cache(registry: Registry) -> None:
    first = heartbeat()
    first.hello.prefix_cache = False
    worker = registry.admit(first)
    names = chain_hashes(None, list(range(48)), 16)
    worker.reported.prefixes.expect(names)
    assert worker.view(names).cached_blocks == 0
