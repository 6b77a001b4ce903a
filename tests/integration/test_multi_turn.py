"""Delta transfer: of a chat's next turn only what the decode worker lacks travels, wherever the rest came from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from engine_driver import EngineDriver
from service import Service, running_service, wait_until

from tandem.config import TINY_MODEL
from tandem.types import Delta, Event, RequestReport, SamplingParams

BLOCK = 16
TURN = SamplingParams(max_tokens=29, ignore_eos=True)
POOL_BLOCKS = 200


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(
        tmp_path_factory.mktemp("turns"),
        decode=2,
        engine={"num_blocks": POOL_BLOCKS},
        router={"heartbeat_interval_s": 0.05},
    ) as service:
        yield service


@pytest.fixture(scope="module")
def cold() -> EngineDriver:
    return EngineDriver(TINY_MODEL, prefix_cache=False, threads=1)


def words(name: str, count: int) -> list[int]:
    """Tokens that no other name has."""
    return random.Random(name).choices(range(3, 1500), k=count)


def ask(service: Service, prompt: list[int]) -> tuple[list[int], RequestReport]:
    (choice,) = service.client.complete(prompt, sampling=TURN).choices
    return [token.id for token in choice.tokens], choice.report


def bytes_of(service: Service, tokens: int) -> int:
    return tokens * service.status().workers[0].model.fingerprint.token_bytes


def heard_idle(service: Service) -> bool:
    """Whether the router has heard that all blocks are free: a chat's home must not look fuller than the others."""
    return all(worker.load.free_blocks == POOL_BLOCKS for worker in service.status().workers)


def whole_blocks(tokens: int) -> int:
    return tokens // BLOCK * BLOCK


@pytest.mark.parametrize("first", [37, 48, 67])
def test_of_each_turn_only_what_is_new_travels(service: Service, cold: EngineDriver, first: int) -> None:
    """Nor does what decode computed itself come back to it. Of an answer's last token no KV was ever made."""
    history, there, home = words(f"chat {first}", first), 0, ""
    for turn in range(4):
        wait_until(lambda: heard_idle(service), what="the last turn's blocks counted as free")
        answer, report = ask(service, history)
        assert answer == cold.generate([history], TURN)[0]
        assert report.kv_reused_tokens == whole_blocks(there)
        assert report.kv_bytes == bytes_of(service, len(history) - whole_blocks(there))
        assert report.decode_worker == (home or report.decode_worker), "where the chat's KV is"
        home, there = report.decode_worker, len(history) + len(answer) - 1
        history = [*history, *answer, *words(f"turn {first} {turn}", 11)]


@contextmanager
def decoding(service: Service, prompt: list[int], max_tokens: int) -> Iterator[Iterator[Event]]:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    with service.client.generate(prompt, sampling=sampling) as answer:
        yield iter(answer)


def read(events: Iterator[Event], tokens: int) -> list[int]:
    told: list[int] = []
    while len(told) < tokens:
        event = next(events)
        told += [token.id for token in event.tokens] if isinstance(event, Delta) else []
    return told


def test_what_another_client_is_still_given_is_shared(service: Service, cold: EngineDriver) -> None:
    """The blocks of a request that decodes, those of its answer so far as well."""
    opening = words("live", 83)
    with decoding(service, words("elsewhere", 40), 1500) as elsewhere, decoding(service, opening, 1200) as events:
        read(elsewhere, 2)
        told = read(events, 2 * BLOCK + 1)[: 2 * BLOCK]
        prompt = [*opening, *told, *words("and now", 9)]
        answer, report = ask(service, prompt)
        assert service.status().live_requests == 2, "both still decode"
        shared = whole_blocks(len(opening) + len(told))
        assert report.kv_reused_tokens == shared
        assert report.kv_bytes == bytes_of(service, len(prompt) - shared)
    assert answer == cold.generate([prompt], TURN)[0]
    wait_until(service.idle, 5, "blocks that were shared are free")
