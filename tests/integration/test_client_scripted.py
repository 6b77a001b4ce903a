"""The SDK against a scripted router over a real socket: events, errors, deadlines, and leaving the loop."""

from __future__ import annotations

import asyncio
import gc
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from scripted_router import REPORT, ScriptedRouter, serving, two_tokens

from tandem import errors
from tandem.client import AsyncClient, AsyncGeneration, Client
from tandem.types import Accepted, ChoiceFinished, Completed, Delta, FinishReason, Token, Usage
from tandem.v1 import generation_pb2

EVENTS = [
    Accepted("request-1", 5),
    Delta(0, (Token(7),), " can"),
    Delta(0, (Token(8),), " vary", FinishReason.STOP, "!"),
    ChoiceFinished(0, FinishReason.STOP, 2, REPORT, "!"),
    Completed(Usage(5, 2)),
]


@pytest.fixture
def router() -> Iterator[ScriptedRouter]:
    with serving(ScriptedRouter()) as started:
        yield started


def strip_start(event: Any) -> Any:
    """Timelines compare by marks: the clock they were made on is not part of the wire."""
    if isinstance(event, ChoiceFinished):
        return (event.choice, event.reason, event.output_tokens, event.stop, event.report.timeline.marks)
    return event


async def forever(request: generation_pb2.GenerateRequest, emit: Any) -> None:
    await emit(Accepted("request-1", 5))
    while True:
        await emit(Delta(0, (Token(1),), "x"))
        await asyncio.sleep(0.01)


async def silent(request: generation_pb2.GenerateRequest, emit: Any) -> None:
    await emit(Accepted("request-1", 5))
    await asyncio.Event().wait()


def failing(error: Exception) -> Any:
    async def script(request: generation_pb2.GenerateRequest, emit: Any) -> None:
        await emit(Accepted("request-1", 5))
        raise error

    return script


async def each(answer: AsyncGeneration, act: Callable[[], Any]) -> None:
    """Acts once after every event."""
    async for _ in answer:
        done = act()
        if inspect.isawaitable(done):
            await done


async def was_cancelled(router: ScriptedRouter) -> bool:
    return await asyncio.to_thread(router.cancelled.wait, 1.0)


async def test_async_events_come_typed_and_in_order(router: ScriptedRouter) -> None:
    async with AsyncClient(router.address) as client:
        events = [event async for event in client.generate("The color of dog")]
    assert list(map(strip_start, events)) == list(map(strip_start, EVENTS))
    assert router.requests[0].text == b"The color of dog"


def test_sync_events_are_the_same(router: ScriptedRouter) -> None:
    with Client(router.address) as client:
        events = list(client.generate([1, 2, 3], temperature=0.5))
    assert list(map(strip_start, events)) == list(map(strip_start, EVENTS))
    assert list(router.requests[0].token_ids.ids) == [1, 2, 3]
    assert router.requests[0].sampling.temperature == 0.5


async def test_complete_gathers_every_choice(router: ScriptedRouter) -> None:
    async with AsyncClient(router.address) as client:
        whole = await client.complete("p", n=2)
    with Client(router.address) as blocking:
        same = await asyncio.to_thread(blocking.complete, "p", n=2)
    assert [choice.text for choice in whole.choices] == [" can vary"] * 2 == [choice.text for choice in same.choices]
    assert whole.text == " can vary"
    assert whole.request_id == "request-1"
    assert whole.usage == Usage(5, 4)
    assert [token.id for token in whole.choices[1].tokens] == [7, 8]
    assert whole.choices[1].report.kv_bytes == 4096


async def test_break_cancels_at_once(router: ScriptedRouter) -> None:
    router.script = forever
    async with AsyncClient(router.address) as client:
        answer = client.generate("p")  # held: only the loop's own iterator may keep the call alive
        async for event in answer:
            if isinstance(event, Delta):
                break
        assert await was_cancelled(router)
        with pytest.raises(RuntimeError, match="only once"):
            answer.__aiter__()


async def test_an_exception_in_the_loop_cancels(router: ScriptedRouter) -> None:
    router.script = forever
    async with AsyncClient(router.address) as client:
        with pytest.raises(ZeroDivisionError):
            await each(client.generate("p"), lambda: 1 / 0)
        assert await was_cancelled(router)


async def test_a_cancelled_task_cancels_the_call(router: ScriptedRouter) -> None:
    router.script = silent
    accepted = asyncio.Event()

    async def read(client: AsyncClient) -> None:
        async for _ in client.generate("p"):
            accepted.set()

    async with AsyncClient(router.address) as client:
        task = asyncio.create_task(read(client))
        await asyncio.wait_for(accepted.wait(), 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await was_cancelled(router)


async def test_aclose_from_outside_ends_the_loop_with_cancelled(router: ScriptedRouter) -> None:
    router.script = silent
    async with AsyncClient(router.address) as client:
        answer = client.generate("p")
        with pytest.raises(errors.Cancelled):
            await each(answer, answer.aclose)
        assert await was_cancelled(router)


async def test_leaving_async_with_cancels(router: ScriptedRouter) -> None:
    router.script = silent
    async with AsyncClient(router.address) as client:
        async with client.generate("p") as answer:
            events = aiter(answer)
            await anext(events)
        assert await was_cancelled(router)


async def test_garbage_cancels(router: ScriptedRouter) -> None:
    router.script = silent
    async with AsyncClient(router.address) as client:
        events = aiter(client.generate("p"))
        await anext(events)
        del events
        gc.collect()
        assert await was_cancelled(router)


def test_sync_break_cancels_at_once(router: ScriptedRouter) -> None:
    router.script = forever
    with Client(router.address) as client:
        answer = client.generate("p")
        for event in answer:
            if isinstance(event, Delta):
                break
        assert router.cancelled.wait(1.0)


def test_sync_close_from_outside_ends_the_loop_with_cancelled(router: ScriptedRouter) -> None:
    router.script = silent
    with Client(router.address) as client, client.generate("p") as answer:
        with pytest.raises(errors.Cancelled):
            list(map(lambda _: answer.close(), answer))  # noqa: C417
        assert router.cancelled.wait(1.0)


async def test_the_deadline_is_grpcs_own(router: ScriptedRouter) -> None:
    router.script = silent
    async with AsyncClient(router.address) as client:
        with pytest.raises(errors.DeadlineExceeded, match="timeout_s"):
            # Long enough for the call to reach a busy machine's router.
            await client.complete("p", timeout_s=2)
        assert await was_cancelled(router)
    assert router.time_left_s[0] is not None
    assert 0 < router.time_left_s[0] < 2.1  # gRPC rounds up


def test_a_client_wide_deadline_holds_for_calls_without_one(router: ScriptedRouter) -> None:
    with Client(router.address, timeout_s=30) as client:
        client.complete("p")
        client.complete("p", timeout_s=5)
    assert [round(left or 0) for left in router.time_left_s] == [30, 5]


@pytest.mark.parametrize("kind", sorted(set(errors.CODES.values()), key=lambda kind: kind.__name__))
async def test_every_error_comes_back_as_itself(router: ScriptedRouter, kind: type[errors.TandemError]) -> None:
    router.script = failing(kind("no, because", field="stop", retry_after_ms=250))
    async with AsyncClient(router.address) as client:
        with pytest.raises(errors.TandemError) as caught:
            await client.complete("p")
    with Client(router.address) as blocking, pytest.raises(errors.TandemError) as caught_too:
        await asyncio.to_thread(blocking.complete, "p")
    for error in (caught.value, caught_too.value):
        assert type(error) is errors.CODES[kind.code]
        assert (error.message, error.field, error.retry_after_ms) == ("no, because", "stop", 250)


@pytest.mark.parametrize("status", [grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED])
async def test_what_grpc_turned_away_is_overload(status: grpc.StatusCode) -> None:
    """A status that no Tandem process sent, from a real server."""

    async def turn_away(_: Any, context: Any) -> None:
        await context.abort(status)

    handlers = {"Generate": grpc.unary_stream_rpc_method_handler(turn_away)}
    handlers["Status"] = grpc.unary_unary_rpc_method_handler(turn_away)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("tandem.v1.Generation", handlers),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with AsyncClient(address) as client:
        with pytest.raises(errors.Overloaded) as caught:
            await client.complete("p")
        with pytest.raises(errors.Overloaded):
            await client.status()
    with Client(address) as blocking, pytest.raises(errors.Overloaded) as caught_too:
        await asyncio.to_thread(blocking.complete, "p")
    assert caught.value.retry_after_ms == caught_too.value.retry_after_ms == 1000
    await server.stop(0)


async def test_an_answer_that_just_stops_is_an_error(router: ScriptedRouter) -> None:
    async def cut(request: generation_pb2.GenerateRequest, emit: Any) -> None:
        await emit(Accepted("request-1", 5))

    router.script = cut
    async with AsyncClient(router.address) as client:
        with pytest.raises(errors.InternalError, match="last event"):
            await client.complete("p")
    with Client(router.address) as blocking, pytest.raises(errors.InternalError, match="last event"):
        await asyncio.to_thread(blocking.complete, "p")


async def test_no_router_is_unavailable_and_named() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(errors.Unavailable, match=r"cannot reach a Tandem router at 127\.0\.0\.1:1"):
            await client.complete("p")
        with pytest.raises(errors.Unavailable):
            await client.status()
    with Client("127.0.0.1:1") as blocking, pytest.raises(errors.Unavailable):
        blocking.models()


async def test_a_closed_client_says_so(router: ScriptedRouter) -> None:
    client, blocking = AsyncClient(router.address), Client(router.address)
    await client.complete("p")
    await client.close()
    blocking.close()
    with pytest.raises(RuntimeError, match="closed"):
        await client.complete("p")
    with pytest.raises(RuntimeError, match="closed"):
        blocking.complete("p")


async def test_close_cancels_what_is_under_way(router: ScriptedRouter) -> None:
    router.script = silent
    client = AsyncClient(router.address)
    with pytest.raises(errors.Cancelled):
        await each(client.generate("p"), client.close)
    assert await was_cancelled(router)


async def test_two_hundred_answers_share_a_connection(router: ScriptedRouter) -> None:
    router.script = two_tokens
    async with AsyncClient(router.address) as client:
        answers = await asyncio.gather(*(client.complete("p") for _ in range(200)))
    assert {answer.text for answer in answers} == {" can vary"}
