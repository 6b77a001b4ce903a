"""Embed on the real service: the vectors of transformers' own model, typed errors, and nothing left behind."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
from service import Service, running_service, unseen_prompt, wait_until
from tokenizers import Tokenizer
from transformers import AutoModel

import tandem
from tandem.client.embedding import Embeddings
from tandem.config import TINY_MODEL
from tandem.errors import DeadlineExceeded, InvalidRequest, WorkerLost
from tandem.types import MAX_EMBED_INPUTS, Role

# Of the tiny model; a KV pool of 1600 tokens.
MODEL_LENGTH, BLOCKS = 2048, 100
TEXTS = ["The color of dog", "The capital of France is", "Once upon a time there was a little rabbit"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(
        tmp_path_factory.mktemp("embed"),
        prefill=2,
        # Small steps: prompts are cut into chunks, and a long one can be caught in mid-prefill.
        engine={"max_step_tokens": 8, "num_blocks": BLOCKS},
        router={"heartbeat_interval_s": 0.05},
    ) as service:
        yield service


@pytest.fixture(autouse=True)
def _idle(service: Service) -> Iterator[None]:
    yield
    wait_until(service.idle, 3, "no orphan")
    assert service.client.complete("The color of dog").text == " can vary widely"


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModel.from_pretrained(TINY_MODEL, dtype=torch.float32).eval()


def hidden(model: Any, prompt: str | Sequence[int]) -> torch.Tensor:
    """[T, D]"""
    if isinstance(prompt, str):
        prompt = Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json")).encode(prompt).ids
    with torch.inference_mode():
        states: torch.Tensor = model(input_ids=torch.tensor([list(prompt)])).last_hidden_state[0]
    return states


def assert_close(vectors: Sequence[Sequence[float]], wanted: Sequence[torch.Tensor]) -> None:
    scale = float(torch.stack(list(wanted)).abs().max())
    torch.testing.assert_close(torch.tensor(vectors), torch.stack(list(wanted)), rtol=1e-4, atol=1e-5 * scale)


def test_vectors_are_the_models_own(service: Service, model: Any) -> None:
    prompts = [*TEXTS, unseen_prompt(50)]
    last = [hidden(model, prompt)[-1] for prompt in prompts]
    mean = [hidden(model, prompt).mean(dim=0) for prompt in prompts]
    for _ in ("computed", "from the prefix cache"):
        got = service.client.embed(prompts)
        assert_close(got.vectors, [torch.nn.functional.normalize(vector, dim=0) for vector in last])
        assert all(math.isclose(math.hypot(*vector), 1, rel_tol=1e-5) for vector in got.vectors)
        assert_close(service.client.embed(prompts, normalize=False).vectors, last)
        assert_close(service.client.embed(prompts, pooling="mean", normalize=False).vectors, mean)
    assert (got.usage.prompt_tokens, got.usage.output_tokens) == (sum(len(hidden(model, p)) for p in prompts), 0)


def test_one_text_may_stand_alone(service: Service) -> None:
    assert service.client.embed(TEXTS[0]).vectors == service.client.embed([TEXTS[0]]).vectors


async def test_the_asyncio_client_embeds_too(service: Service) -> None:
    async with tandem.AsyncClient(service.address) as client:
        got = await client.embed(TEXTS, pooling=tandem.Pooling.MEAN)
    assert_close(got.vectors, [torch.tensor(vector) for vector in service.client.embed(TEXTS, pooling="mean").vectors])


def test_a_cached_prefix_saves_computation_for_last_pooling_alone(service: Service) -> None:
    prompt = unseen_prompt(100)
    service.client.embed([prompt])
    # Heartbeats tell the router which worker has it.
    wait_until(lambda: service.client.embed([prompt]).usage.cached_prompt_tokens == 96, 5, "a prefix hit")
    assert service.client.embed([prompt], pooling="mean").usage.cached_prompt_tokens == 0
    assert service.client.embed([prompt], cache_salt="another tenant").usage.cached_prompt_tokens == 0


def test_a_prompt_that_was_embedded_is_cached_for_generation(service: Service) -> None:
    prompt = unseen_prompt(100)
    service.client.embed([prompt], pooling="mean")
    wait_until(lambda: service.client.complete(prompt, max_tokens=1).usage.cached_prompt_tokens == 96, 5, "a hit")


def test_a_full_batch_is_spread_and_comes_back_in_order(service: Service, model: Any) -> None:
    def steps() -> dict[str, int]:
        return {w.worker_id: w.load.steps for w in service.status().workers if Role.PREFILL in w.roles}

    before, prompts = steps(), [unseen_prompt(20 + index) for index in range(MAX_EMBED_INPUTS)]
    got = service.client.embed(prompts, normalize=False)
    assert_close(got.vectors, [hidden(model, prompt)[-1] for prompt in prompts])
    wait_until(lambda: all(count > before[worker] for worker, count in steps().items()), 3, "both worked")


def test_generation_goes_on_beside_it(service: Service) -> None:
    prompts = [unseen_prompt(60) for _ in range(4)]
    alone = [service.client.complete(prompt, max_tokens=20, ignore_eos=True).text for prompt in prompts]
    with ThreadPoolExecutor(5) as threads:
        vectors = threads.submit(service.client.embed, [unseen_prompt(200) for _ in range(16)], pooling="mean")
        answers = [threads.submit(service.client.complete, p, max_tokens=20, ignore_eos=True) for p in prompts]
        assert [answer.result().text for answer in answers] == alone
        assert len(vectors.result().vectors) == 16


@pytest.mark.parametrize(
    ("inputs", "options", "field", "words"),
    [
        ([], {}, "inputs", "1 to 64, not 0"),
        (["a"] * 65, {}, "inputs", "1 to 64, not 65"),
        (["a", ""], {}, "inputs", "inputs[1]: the prompt is empty"),
        ([[]], {}, "inputs", "inputs[0]: the prompt is empty"),
        ([[5, 1536]], {}, "inputs", "inputs[0]: token ids must be below 1536"),
        ([[-1]], {}, "prompt", "in [0, 2^32)"),
        ([5], {}, "prompt", "str or a list of token ids"),
        (5, {}, "inputs", "list of prompts"),
        (b"bytes", {}, "inputs", "list of prompts"),
        ([[5] * 2049], {}, "inputs", "inputs[0]: the prompt has 2049 tokens; the model's limit is 2048"),
        ([[5] * 1601], {}, "prompt", "holds 1600"),
        (["a"], {"pooling": "max"}, "pooling", "last or mean"),
        (["a"], {"timeout_s": -1}, "timeout_s", "above 0"),
    ],
)
def test_what_is_wrong_is_named(service: Service, inputs: Any, options: Any, field: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        service.client.embed(inputs, **options)
    assert (caught.value.field, words in caught.value.message) == (field, True), caught.value.message


def test_the_deadline_frees_everything(service: Service) -> None:
    with pytest.raises(DeadlineExceeded):
        service.client.embed([unseen_prompt(1500) for _ in range(8)], pooling="mean", timeout_s=0.1)
    wait_until(service.idle, 1, "nothing held")


@pytest.mark.alone
async def test_leaving_frees_everything(service: Service) -> None:
    async with tandem.AsyncClient(service.address) as client:
        asked = asyncio.ensure_future(client.embed([unseen_prompt(1500) for _ in range(8)]))  # noqa: RUF006
        while not (await client.status()).live_requests:
            await asyncio.sleep(0.005)
        asked.cancel()
        with suppress(asyncio.CancelledError):
            await asked
        start = time.monotonic()
        while (await client.status()).live_requests:
            await asyncio.sleep(0.005)
        assert time.monotonic() - start < 1
    await asyncio.to_thread(wait_until, service.idle, 1, "nothing held")


def test_a_worker_that_dies_ends_the_call_with_one_clear_error(service: Service) -> None:
    with ThreadPoolExecutor(1) as threads:
        asked: Future[Embeddings] = threads.submit(service.client.embed, [unseen_prompt(1500) for _ in range(16)])
        wait_until(lambda: service.status().live_requests, 5, "live")
        service.kill("prefill-0")
        with pytest.raises(WorkerLost, match=r"prefill worker .* was lost"):
            asked.result(timeout=5)
