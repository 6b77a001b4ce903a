"""`tandem bench` against the real service: router and workers as processes, the tiny model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from service import Service, running_service

from loadtest.schedule.plan import Plan
from loadtest.schedule.workloads import Lengths
from loadtest.session import Measuring, Result, measure
from loadtest.targets.grpc import GrpcTarget
from loadtest.targets.openai import OpenAITarget
from loadtest.targets.target import SendOptions
from tandem.client import AsyncClient
from tandem.errors import ConfigError


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("service")) as started:
        yield started


async def measured(service: Service, plan: Plan, measuring: Measuring | None = None, kind: str = "grpc") -> Result:
    options = SendOptions(timeout_s=60)
    target = GrpcTarget(service.address, options) if kind == "grpc" else OpenAITarget(service.http, options)
    try:
        return await measure(target, plan, measuring or Measuring(), asyncio.Event())
    finally:
        await target.close()


BOTH = pytest.mark.parametrize("kind", ["grpc", "openai"])


@BOTH
async def test_random_load_is_answered_to_the_last_token(service: Service, kind: str) -> None:
    plan = Plan(num_prompts=12, request_rate=20, lengths=Lengths(40, 6, 0.5))
    result = await measured(service, plan, Measuring(num_warmups=2, goodput={"e2el": 60_000}), kind)
    found, outcomes = result.figures, result.run.outcomes
    assert (found["completed"], found["failures"], found["attainment"]) == (12, {}, 1.0)
    asked = [arrival.request for arrival in result.schedule.arrivals]
    assert [each.prompt_tokens for each in outcomes] == [len(each.prompt_ids) for each in asked]
    assert [each.output_tokens for each in outcomes] == [each.output_tokens for each in asked]
    assert 0 < found["median_ttft_ms"] <= found["median_e2el_ms"]


async def test_the_routers_timeline_fits_into_what_is_measured(service: Service) -> None:
    result = await measured(service, Plan(num_prompts=4, request_rate=20, lengths=Lengths(40, 6)))
    for each in result.run.outcomes:
        assert each.sent_s is not None
        assert each.phases_ms["first_token"] <= (each.arrivals_s[0] - each.sent_s) * 1000 + 1
        assert len(set(each.workers)) == 2


async def test_a_trace_with_shared_prefixes_finds_them_in_the_cache(service: Service) -> None:
    """Two turns of one conversation: the second one's prompt begins with the first one's, block for block."""
    plan = Plan(workload="mooncake", num_prompts=10, scale_lengths=1 / 32, scale_time=0.05, seed=11)
    result = await measured(service, plan, Measuring(max_concurrency=4))
    assert result.figures["failures"] == {}
    prompts = [arrival.request.prompt_ids.tolist() for arrival in result.schedule.arrivals]
    async with AsyncClient(service.address) as client:
        again = await client.complete(prompts[0], max_tokens=1)
    # All share the two blocks of the system prompt, 16 tokens each at this scale: one KV block apiece.
    assert all(prompt[:32] == prompts[0][:32] for prompt in prompts)
    assert again.usage.cached_prompt_tokens >= 32


async def test_ids_that_the_model_does_not_know_are_refused_where_the_service_tells_how_many_it_knows(
    service: Service,
) -> None:
    plan = Plan(num_prompts=2, lengths=Lengths(50, 2), vocab_size=2**31 - 1)
    with pytest.raises(ConfigError, match="--vocab-size must be at most 1536"):
        await measured(service, plan)
    found = (await measured(service, plan, kind="openai")).figures  # OpenAI's API does not tell
    assert found["failures"] == {"http_400": 2}
    assert "token ids must be below 1536" in found["first_errors"]["http_400"]
