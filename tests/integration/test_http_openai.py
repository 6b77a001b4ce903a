"""The OpenAI door, spoken to by OpenAI's own package: the same text and tokens as over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from service import Service, running_service, wait_until
from transformers import AutoTokenizer

from tandem.client import Completion
from tandem.config import TINY_MODEL

PROMPT = "The color of dog"
MESSAGES: list[Any] = [
    {"role": "system", "content": "Answer in one sentence."},
    {"role": "user", "content": [{"type": "text", "text": "What is the capital of Australia?"}]},
]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("http")) as service:
        yield service


@pytest.fixture(scope="module")
def url(service: Service) -> str:
    return service.http


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def extra(**fields: Any) -> dict[str, Any]:
    return {"return_token_ids": True, **fields}


def told(completion: Completion) -> list[tuple[str, list[int], str]]:
    return [(choice.text, [token.id for token in choice.tokens], str(choice.reason)) for choice in completion.choices]


def answered(completion: Any) -> list[tuple[str, list[int], str]]:
    return [(choice.text, choice.token_ids, choice.finish_reason) for choice in completion.choices]


def streamed(chunks: Any) -> list[tuple[str, list[int], str]]:
    texts: dict[int, str] = {}
    ids: dict[int, list[int]] = {}
    reasons: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            assert choice.index not in reasons, "nothing comes after the end"
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            ids.setdefault(choice.index, []).extend(choice.token_ids)
            assert choice.token_ids, "every chunk has tokens, also the one that says how it ended"
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    return [(texts[index], ids[index], reasons[index]) for index in sorted(texts)]


@pytest.mark.parametrize(
    ("openais", "vllms", "ours"),
    [
        ({"temperature": 0}, {}, {}),
        ({"temperature": 0, "max_tokens": 12}, {"ignore_eos": True}, {"max_tokens": 12, "ignore_eos": True}),
        ({"temperature": 0.9, "seed": 7, "n": 3}, {}, {"temperature": 0.9, "seed": 7, "n": 3}),
        (
            {"temperature": 2, "seed": 5, "top_p": 0.9},
            {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.2, "min_tokens": 10},
            {
                "temperature": 2,
                "seed": 5,
                "top_p": 0.9,
                "top_k": 40,
                "min_p": 0.01,
                "repetition_penalty": 1.2,
                "min_tokens": 10,
            },
        ),
        ({"temperature": 0, "stop": " wid"}, {}, {"stop": " wid"}),
        ({"temperature": 0, "logit_bias": {"300": 100}}, {}, {"logit_bias": {300: 100}}),
        (
            {"temperature": 1, "seed": 3, "presence_penalty": 1, "frequency_penalty": 0.5},
            {"top_k": -1},
            {"temperature": 1, "seed": 3, "presence_penalty": 1, "frequency_penalty": 0.5},
        ),
    ],
)
def test_completions_are_those_of_the_sdk(
    service: Service, client: openai.OpenAI, openais: dict[str, Any], vllms: dict[str, Any], ours: dict[str, Any]
) -> None:
    wanted = told(service.client.complete(PROMPT, **{"max_tokens": 16, **ours}))
    asked = {"model": "tiny", "prompt": PROMPT, **openais}
    assert answered(client.completions.create(**asked, extra_body=extra(**vllms))) == wanted
    assert streamed(client.completions.create(**asked, stream=True, extra_body=extra(**vllms))) == wanted


def test_token_ids_and_batches_are_prompts(service: Service, client: openai.OpenAI) -> None:
    prompts = ["The color of", "Canberra is", PROMPT]
    wanted = [told(service.client.complete(prompt, max_tokens=6, n=2, seed=1, temperature=1.0)) for prompt in prompts]
    flat = [choice for each in wanted for choice in each]
    asked: Any = {"model": "tiny", "max_tokens": 6, "n": 2, "seed": 1, "extra_body": extra()}
    assert answered(client.completions.create(prompt=prompts, **asked)) == flat
    assert streamed(client.completions.create(prompt=prompts, stream=True, **asked)) == flat
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    assert answered(client.completions.create(prompt=ids, **asked)) == flat
    assert answered(client.completions.create(prompt=ids[0], **asked)) == wanted[0]


def test_logprobs_of_completions(service: Service, client: openai.OpenAI) -> None:
    wanted = service.client.complete(PROMPT, max_tokens=8, logprobs=2).choices[0].tokens
    asked: Any = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 2}
    whole = client.completions.create(**asked).choices[0].logprobs
    assert whole is not None
    assert whole.tokens == [" can", " vary", " widely", "</s>"]
    assert whole.text_offset == [0, 4, 9, 16]
    assert whole.token_logprobs == [token.logprob for token in wanted]
    assert [list((top or {}).values()) for top in whole.top_logprobs or []] == [
        [logprob for _, logprob in token.top_logprobs] for token in wanted
    ]
    pieces = [choice.logprobs for chunk in client.completions.create(**asked, stream=True) for choice in chunk.choices]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [each for piece in pieces if piece for each in getattr(piece, name)] == getattr(whole, name)


def chat_prompt() -> list[int]:
    """As transformers has it."""
    plain = [MESSAGES[0], {"role": "user", "content": MESSAGES[1]["content"][0]["text"]}]
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    found = tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=True)["input_ids"]
    return [int(token) for token in found]


def test_chat_is_the_model_s_template_and_then_the_same(service: Service, client: openai.OpenAI) -> None:
    wanted = service.client.complete(chat_prompt(), max_tokens=24, logprobs=2).choices[0]
    asked: Any = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked, max_completion_tokens=24, extra_body=extra())
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(chat_prompt())
    choice: Any = whole.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", wanted.text)
    assert choice.token_ids == [token.id for token in wanted.tokens]
    entries = choice.logprobs.content
    assert [entry.logprob for entry in entries] == [token.logprob for token in wanted.tokens]
    assert [[top.logprob for top in entry.top_logprobs] for entry in entries] == [
        [logprob for _, logprob in token.top_logprobs] for token in wanted.tokens
    ]
    assert b"".join(bytes(entry.bytes) for entry in entries).startswith(wanted.text.encode())
    chunks = list(client.chat.completions.create(**asked, max_tokens=24, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == wanted.text
    assert [delta.role for delta in deltas if delta.role] == ["assistant"] == [deltas[0].role]
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [choice.finish_reason]
    assert all(chunk.choices[0].logprobs.content for chunk in chunks), "no chunk of its own for the end"
    told_entries = [entry for chunk in chunks if (found := chunk.choices[0].logprobs) for entry in found.content or []]
    assert told_entries == entries


def test_a_second_turn_takes_the_first_one_s_answer(service: Service, client: openai.OpenAI) -> None:
    """As it came, and as what pydantic makes of it, with every field of OpenAI's type."""
    asked: Any = {"model": "tiny", "temperature": 0, "max_completion_tokens": 8}
    answer = client.chat.completions.create(**asked, messages=MESSAGES).choices[0].message
    plain, dumped = {"role": "assistant", "content": answer.content}, answer.model_dump()
    assert {name for name, value in dumped.items() if value is None} >= {"refusal", "tool_calls", "audio"}
    said = []
    for message in (plain, answer, dumped, {**dumped, "tool_calls": []}):
        turns: Any = [*MESSAGES, message, {"role": "user", "content": "And of Austria?"}]
        second = client.chat.completions.create(**asked, messages=turns)
        said.append((second.choices[0].message.content, second.usage and second.usage.prompt_tokens))
    assert said == [said[0]] * 4


def test_usage_says_where_the_time_went(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "prompt": PROMPT, "temperature": 0}
    usage: Any = client.completions.create(**asked).usage
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    for each in (usage, chunks[-1].usage):
        assert (each.prompt_tokens, each.completion_tokens, each.total_tokens) == (5, 4, 9)
        table = each.tandem
        spans = [table[f"{name}_ms"] for name in ("queue", "prefill", "handoff", "first_decode", "decode")]
        assert all(span >= 0 for span in spans)
        assert sum(spans) == pytest.approx(table["total_ms"], abs=0.01)
        assert sum(spans[:2]) == pytest.approx(table["ttft_ms"], abs=0.01)
        assert table["transport"] == "shm"
        assert table["kv_bytes"] > 0


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "tandem")
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="model 'other' is not served; served: tiny"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "max_tokens"),
        ({"top_p": 0}, openai.BadRequestError, "top_p"),
        ({"prompt": ""}, openai.BadRequestError, "prompt"),
        ({"prompt": [-1]}, openai.BadRequestError, "prompt"),
        ({"suffix": "x"}, openai.BadRequestError, "suffix"),
        ({"best_of": 2}, openai.BadRequestError, "best_of"),
        ({"logit_bias": {"9999": 1}}, openai.BadRequestError, "logit_bias"),
        ({"extra_body": {"max_token": 4}}, openai.BadRequestError, "max_token"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_those_that_openai_s_clients_know(
    client: openai.OpenAI, fields: dict[str, Any], kind: type[openai.APIStatusError], param: str, stream: bool
) -> None:
    with pytest.raises(kind) as caught:
        client.completions.create(**{"model": "tiny", "prompt": PROMPT, "stream": stream, **fields})
    assert caught.value.param == param
    assert param in caught.value.message


async def test_a_client_that_leaves_frees_both_pools(service: Service, url: str) -> None:
    before = service.status().cancelled_requests
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        asked: Any = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1500, "extra_body": {"ignore_eos": True}}
        stream = await client.completions.create(**asked, stream=True)
        await anext(aiter(stream))
        whole = asyncio.create_task(client.completions.create(**asked))

        def both_live() -> bool:
            status = service.status(check_integrity=True)
            held = [worker.integrity.referenced_blocks for worker in status.workers if worker.integrity]
            return status.live_requests == 2 and max(held) > 90

        await asyncio.to_thread(wait_until, both_live)
        await stream.close()
        whole.cancel()
        await asyncio.gather(whole, return_exceptions=True)
    await asyncio.to_thread(wait_until, service.idle)
    assert service.status().cancelled_requests == before + 2


def test_health_readiness_and_metrics(service: Service, client: openai.OpenAI, url: str) -> None:
    client.completions.create(model="tiny", prompt=PROMPT, temperature=0)
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    finished = service.status().finished_requests
    answers = [httpx.get(f"{url}/ready") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert answers[0].json()["transport"] == "shm"
    assert answers[0].json()["kv_bytes"] > 0, "KV crossed between the workers"
    assert service.status().finished_requests == finished + 1, "asked three times, tried once"
    samples = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if not line.startswith("#")]
    values = {name: float(value) for name, _, value in (line.rpartition(" ") for line in samples)}
    assert values['tandem_requests_total{outcome="ok"}'] >= 1
    assert values["tandem_live_requests"] == 0
    for name in ("ttft", "tpot", "e2e"):
        assert values[f"tandem_{name}_seconds_count"] >= 1
    for phase in ("queue", "prefill", "handoff", "first_decode", "decode"):
        assert values[f'tandem_phase_seconds_count{{phase="{phase}"}}'] >= 1
    assert values['tandem_kv_transferred_bytes_total{transport="shm"}'] > 0
    ups = {name: value for name, value in values.items() if name.startswith("tandem_worker_up")}
    assert sorted(name.partition('roles="')[2].partition('"')[0] for name in ups) == ["decode", "prefill"]
    assert set(ups.values()) == {1}
