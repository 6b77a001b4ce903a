"""One joined worker, as the router sees it: what it reports, the link to it, what is placed on it."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import Sequence

from router.aio import first_of
from router.policy.base import WorkerView
from router.pool.books import Books, OnLoss
from router.pool.link import WorkerLink
from router.pool.prefix_index import PrefixIndex
from tandem import errors, wire
from tandem.config import RouterConfig
from tandem.types import Role
from tandem.v1 import registry_pb2, worker_pb2

log = logging.getLogger(__name__)

# Directives that may wait for a worker's stream.
MAX_DIRECTIVES = 16


class Reported:
    """What a worker says of itself: its hello, and its last heartbeat."""

    def __init__(self, first: registry_pb2.Heartbeat) -> None:
        hello = self.hello = first.hello
        # Its proof that a later Join is its own; in no status.
        self._instance = hello.instance
        hello.ClearField("instance")
        self.model = wire.model_from_wire(hello.model)
        self.roles = wire.roles_from_wire(list(hello.roles))
        self.prefixes = PrefixIndex(hello.total_blocks if hello.prefix_cache else 0)
        self.heartbeat(first)

    def heartbeat(self, heartbeat: registry_pb2.Heartbeat) -> None:
        """A hello in a later heartbeat says that the worker's roles have changed."""
        self.at_s = time.monotonic()
        self.load = heartbeat.load
        self.draining = heartbeat.draining
        self.prefixes.apply(wire.cache_changes_from_wire(heartbeat.prefix_cache))
        if heartbeat.hello.roles:
            # Its roles alone: nothing else that it was admitted with can change.
            self.roles = wire.roles_from_wire(list(heartbeat.hello.roles))

    def is_same_process(self, hello: registry_pb2.Hello) -> bool:
        return bool(self._instance) and hmac.compare_digest(self._instance.encode(), hello.instance.encode())


class Worker:
    """A worker from its Join to its loss.

    joined ──dialled back, Subscribe accepted──▶ routable ──draining──▶ live requests only ──the last──▶ dismissed
       └───────────────┬───────────────────────────┴──────────────────────┘
                       ▼ a stream ended, heartbeats are silent, or the same process joined again
                     lost: no new work; live requests fail with WorkerLost; the channel is closed
    """

    def __init__(self, first: registry_pb2.Heartbeat, config: RouterConfig) -> None:
        self.id = first.hello.worker_id
        self.reported = Reported(first)
        self.books = Books()
        self.link = WorkerLink(self.id, first.hello.address, config)
        self.routable = False
        self.directives: asyncio.Queue[registry_pb2.Directive] = asyncio.Queue(MAX_DIRECTIVES)
        self._config = config
        self._drain_asked = self._dismissed = False
        self._decode_wanted, self._lost = asyncio.Event(), asyncio.Event()
        self._note_roles()

    # What is known about it.

    @property
    def roles(self) -> frozenset[Role]:
        return self.reported.roles

    @property
    def load(self) -> registry_pb2.Load:
        return self.reported.load

    @property
    def draining(self) -> bool:
        return self._drain_asked or self.reported.draining

    def takes(self, role: Role) -> bool:
        """Whether new work of the role may be placed on it."""
        return self.routable and not self.draining and role in self.roles

    @property
    def ready_roles(self) -> frozenset[Role]:
        """It decodes only while its token stream is open."""
        if not self.routable:
            return frozenset()
        return self.roles if self.books.subscription.is_open else self.roles - {Role.DECODE}

    def view(self, block_names: Sequence[bytes] = ()) -> WorkerView:
        """block_names: of the prompt that is to be placed."""
        reported, load, books = self.reported, self.load, self.books
        return WorkerView(
            worker_id=self.id,
            roles=self.ready_roles,
            draining=self.draining,
            block_size=reported.model.fingerprint.block_size,
            total_blocks=reported.hello.total_blocks,
            free_blocks=load.free_blocks - books.promised.total,
            queued_prompt_tokens=load.queued_prompt_tokens + books.queued.total,
            live_requests=load.running_decodes + load.reservations + load.waiting_reservations + len(books.promised),
            cached_blocks=reported.prefixes.leading(block_names),
            cache_size=len(reported.prefixes),
        )

    def heartbeat(self, heartbeat: registry_pb2.Heartbeat) -> None:
        self.reported.heartbeat(heartbeat)
        self.books.heartbeat(heartbeat.number)
        self._note_roles()
        self._dismiss_if_done()

    def _note_roles(self) -> None:
        if Role.DECODE in self.roles:
            self._decode_wanted.set()

    # What it is told on its Join stream.

    def drain(self) -> None:
        self._direct(registry_pb2.Directive(drain=registry_pb2.Drain()))
        self._drain_asked = True

    def set_roles(self, roles: frozenset[Role]) -> None:
        """A dropped role gets no new work from now on; a new one counts once the worker's hello names it."""
        self._direct(registry_pb2.Directive(set_roles=registry_pb2.SetRoles(roles=wire.roles_to_wire(roles))))
        self.reported.roles &= roles

    def _dismiss_if_done(self) -> None:
        """A draining worker may leave once nothing depends on it: what was placed before it drained may come late."""
        if self.reported.draining and not self.books.live and not self._dismissed:
            with contextlib.suppress(errors.Overloaded):  # the next heartbeat tries again
                self._direct(registry_pb2.Directive(dismiss=registry_pb2.Dismiss()))
                self._dismissed = True

    def _direct(self, directive: registry_pb2.Directive) -> None:
        try:
            self.directives.put_nowait(directive)
        except asyncio.QueueFull:
            raise errors.Overloaded(f"worker {self.id} has not taken its last {MAX_DIRECTIVES} directives") from None

    # Its time here.

    async def serve(self) -> None:
        """Dials the announced address back and keeps the token stream. Runs until it is cancelled or raises."""
        await self.link.dial(self._config.heartbeat_timeout_s)
        if Role.DECODE not in self.roles:
            self._become_routable()
        await self._decode_wanted.wait()
        subscription = self.books.subscription
        with self.link.streaming():
            try:
                call = self.link.decode.Subscribe(worker_pb2.SubscribeRequest(subscriber_id=subscription.id))
                await subscription.open(call, self._config.heartbeat_timeout_s)
            except TimeoutError:
                raise errors.Unavailable(f"worker {self.id} did not accept Subscribe in time") from None
            self._become_routable()
            await first_of(subscription.pump(), self._renew_leases())

    def _become_routable(self) -> None:
        if not self.routable:
            self.routable = True
            address = self.reported.hello.address
            log.info("worker %s is routable: %s at %s", self.id, "+".join(sorted(self.roles)), address)

    async def _renew_leases(self) -> None:
        interval_s = self._config.lease_s / 3
        while True:
            await asyncio.sleep(interval_s)
            if self.books.leases:
                await self.link.renew(sorted(self.books.leases), interval_s)

    def attach(self, key: str, role: Role, on_loss: OnLoss) -> None:
        """on_loss is called when the worker is lost before detach; until then a draining worker is not dismissed."""
        self.books.live[key, role] = on_loss

    def detach(self, key: str, role: Role) -> None:
        self.books.live.pop((key, role), None)
        self._dismiss_if_done()

    @property
    def loss(self) -> errors.TandemError | None:
        """Why it was lost; None while it is not."""
        return self.link.loss

    async def wait_lost(self) -> None:
        """Raises the cause when the worker is lost."""
        await self._lost.wait()
        assert self.loss is not None
        raise self.loss

    def lose(self, cause: errors.TandemError) -> None:
        """Fails whatever is live on it. The first cause counts."""
        if self.loss is not None:
            return
        self.link.loss, self.routable = cause, False
        self._lost.set()
        live, self.books.live = self.books.live, {}
        for (_, role), on_loss in live.items():
            on_loss(self.link.lost_as(role))
