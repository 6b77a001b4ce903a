"""The storm: 300 requests of random lengths and fates on two prefill and two decode workers; nothing is left behind."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from engine_driver import EngineDriver
from service import Service, running_service, wait_until

from tandem.client import AsyncClient
from tandem.config import TINY_MODEL
from tandem.errors import DeadlineExceeded, Overloaded
from tandem.types import Accepted, Completed, Delta, SamplingParams

REQUESTS, AT_ONCE, SEED = 300, 32, 20260731
# 512 tokens in a pool: of sixteen requests on a decode worker, only a few fit at once.
BLOCKS, LONGEST_PROMPT, LONGEST_OUTPUT = 32, 200, 40


@dataclass(frozen=True)
class Order:
    """A request and what is to become of it."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    # complete, or how it ends early: unaccepted, queued, first token, mid-decode, task cancelled, deadline.
    fate: str
    # After so many seconds, for the fates of the clock.
    after_s: float


FATES = {
    "complete": 0.5,
    "unaccepted": 0.08,
    "queued": 0.1,
    "first token": 0.08,
    "mid-decode": 0.1,
    "task cancelled": 0.07,
    "deadline": 0.07,
}


def _orders() -> list[Order]:
    dice = random.Random(SEED)
    return [_order(dice, fate) for fate in dice.choices(list(FATES), list(FATES.values()), k=REQUESTS)]


def _order(dice: random.Random, fate: str) -> Order:
    # A third begins alike: prefix-cache hits on both sides.
    shared = tuple(range(100, 148)) if dice.random() < 0.33 else ()
    prompt = tuple(dice.randrange(3, 1500) for _ in range(dice.randint(1, LONGEST_PROMPT - len(shared))))
    sampling = SamplingParams(
        max_tokens=dice.randint(8, LONGEST_OUTPUT) if fate != "complete" else dice.randint(1, LONGEST_OUTPUT),
        temperature=dice.choice((0.0, 0.8)),
        seed=dice.randrange(2**32),
        # Who is to be left in mid-decode must not end before.
        ignore_eos=fate != "complete" or dice.random() < 0.5,
    )
    return Order(shared + prompt, sampling, fate, dice.uniform(0.002, 0.25))


def _references(orders: list[Order]) -> list[list[int]]:
    """What each would say, from one engine in this process."""
    driver = EngineDriver(TINY_MODEL, kv_memory_mib=256, max_waiting=REQUESTS, prefix_cache=False)
    return driver.generate([list(order.prompt) for order in orders], [order.sampling for order in orders])


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder: Path = tmp_path_factory.mktemp("storm")
    with running_service(
        folder,
        prefill=2,
        decode=2,
        engine={"num_blocks": BLOCKS, "max_step_tokens": 64},
        router={"heartbeat_interval_s": 0.1},
    ) as service:
        yield service


@dataclass
class Outcome:
    tokens: list[int]
    accepted: bool = False
    # complete, left, task cancelled, deadline, refused
    end: str = "left"


class Rider:
    """Sends one order and meets its fate."""

    def __init__(self, client: AsyncClient, order: Order) -> None:
        self._client = client
        self._order = order
        self.outcome = Outcome([])

    async def ride(self) -> Outcome:
        act: dict[str, Callable[[], Awaitable[None]]] = {
            "unaccepted": self._leave_before_the_answer,
            "task cancelled": self._cancelled_by_the_clock,
            "deadline": self._out_of_time,
        }
        await act.get(self._order.fate, self._read)()
        return self.outcome

    async def _read(self, timeout_s: float | None = None) -> None:
        order = self._order
        enough = {"queued": 0, "first token": 1, "mid-decode": order.sampling.max_tokens // 2}.get(order.fate, 10**6)
        async for event in self._client.generate(order.prompt, sampling=order.sampling, timeout_s=timeout_s):
            self.outcome.accepted |= isinstance(event, Accepted)
            if isinstance(event, Delta):
                self.outcome.tokens += [token.id for token in event.tokens]
            elif isinstance(event, Completed):
                self.outcome.end = "complete"
            if len(self.outcome.tokens) >= enough:
                return

    async def _leave_before_the_answer(self) -> None:
        async with self._client.generate(self._order.prompt, sampling=self._order.sampling) as answer:
            reading = asyncio.ensure_future(anext(aiter(answer)))
            await asyncio.sleep(0)  # the request is on its way
            reading.cancel()
            await asyncio.wait({reading})
        self.outcome.end = "left"

    async def _cancelled_by_the_clock(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            async with asyncio.timeout(self._order.after_s):
                await self._read()
        except TimeoutError:
            self.outcome.end = "task cancelled"

    async def _out_of_time(self) -> None:
        try:
            await self._read(timeout_s=self._order.after_s)
        except DeadlineExceeded:
            self.outcome.end = "deadline"
        except Overloaded:  # it could not have been met
            self.outcome.end = "refused"


async def _storm(service: Service, orders: list[Order]) -> tuple[list[Outcome], int]:
    """What became of each, and the most Reserve calls that waited at once, as heartbeats told."""
    room = asyncio.Semaphore(AT_ONCE)
    most_waiting = 0

    async def one(order: Order) -> Outcome:
        async with room:
            return await Rider(client, order).ride()

    async with AsyncClient(service.address) as client:
        riders = [asyncio.create_task(one(order)) for order in orders]
        while (await asyncio.wait(riders, timeout=0.1))[1]:
            loads = [worker.load for worker in (await client.status()).workers]
            most_waiting = max(most_waiting, *(load.waiting_reservations for load in loads))
        return [rider.result() for rider in riders], most_waiting


def test_a_storm_leaves_exact_answers_and_nothing_else(service: Service) -> None:
    orders = _orders()
    wanted = _references(orders)
    outcomes, most_waiting = asyncio.run(asyncio.wait_for(_storm(service, orders), 60))
    for order, tokens, outcome in zip(orders, wanted, outcomes, strict=True):
        if order.fate == "complete" or outcome.end == "complete":
            assert (outcome.end, outcome.tokens) == ("complete", tokens), order
        else:
            assert outcome.tokens == tokens[: len(outcome.tokens)], order
    ends = Counter((order.fate, outcome.end) for order, outcome in zip(orders, outcomes, strict=True))
    assert most_waiting >= 2, "the pools were too large for anybody to wait"
    # Each fault took effect, and not by the clock alone.
    for fate in ("unaccepted", "queued", "first token", "mid-decode"):
        assert ends[fate, "left"] >= 10
        assert ends[fate, "complete"] == 0
    assert ends["task cancelled", "task cancelled"] >= 5
    assert ends["deadline", "deadline"] + ends["deadline", "refused"] >= 5
    cut = [outcome for order, outcome in zip(orders, outcomes, strict=True) if order.fate == "mid-decode"]
    assert all(len(outcome.tokens) >= 4 for outcome in cut)
    wait_until(service.idle, 3, "no orphan on any worker")
    status = service.status()
    completed = sum(outcome.end == "complete" for outcome in outcomes)
    # An answer may be over before the router hears that its client has left in the midst of it.
    late = sum(order.fate in ("mid-decode", "task cancelled", "deadline") for order in orders)
    assert completed <= status.finished_requests <= completed + late
    ended_early = status.cancelled_requests + status.failed_requests
    assert sum(outcome.accepted for outcome in outcomes) <= completed + ended_early <= len(orders)
