"""Embeddings of the engine equal transformers' own final hidden states, pooled, however the prompt was cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import EngineDriver
from model_zoo import save_model
from torch import Tensor
from transformers import AutoModel

from tandem.engine.sequence import Embedded, Failed, Sequence, Started
from tandem.errors import InvalidRequest
from tandem.types import EmbedParams, EngineRequest, Pooling, SamplingParams

LAST, MEAN = EmbedParams(Pooling.LAST), EmbedParams(Pooling.MEAN)
PROMPTS = [[3 + (number * 31 + position * 7) % 120 for position in range(number)] for number in (1, 2, 16, 33, 100)]
# Chunks of 16 tokens; every prompt above but the first ones is cut.
CHUNKED = {"max_step_tokens": 16}


class Embedder(EngineDriver):
    def submit(self, prompt: list[int], params: EmbedParams, salt: str = "") -> Sequence:
        request = EngineRequest("e", tuple(prompt), SamplingParams(), cache_salt=salt)
        self.engine.validate_prompt(request)
        sequence = Sequence(request, lambda event: None, decode_here=False, embed=params)
        self.engine.add(sequence)
        return sequence

    def collect(self, sequences: list[Sequence]) -> list[Tensor]:
        """Their embeddings, once all are there; frees their blocks as a caller must."""
        self.run()
        vectors = {s: event.vector for s, event in self.emissions if isinstance(event, Embedded)}
        for sequence in sequences:
            assert sequence.table is not None
            sequence.table.release()
        return [torch.frombuffer(bytearray(vectors[sequence]), dtype=torch.float32) for sequence in sequences]

    def embed(self, prompts: list[list[int]], params: EmbedParams) -> list[Tensor]:
        return self.collect([self.submit(prompt, params) for prompt in prompts])

    def cached_tokens(self, sequence: Sequence) -> int:
        (started,) = [event for s, event in self.emissions if s is sequence and isinstance(event, Started)]
        return started.cached_tokens


def reference(model: Any, prompt: list[int], params: EmbedParams) -> Tensor:
    with torch.inference_mode():
        hidden: Tensor = model(input_ids=torch.tensor([prompt])).last_hidden_state[0]
    pooled = hidden.mean(dim=0) if params.pooling is Pooling.MEAN else hidden[-1]
    return torch.nn.functional.normalize(pooled, dim=0) if params.normalize else pooled


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2", "gpt_neox", "qwen3_moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(request.param, tmp_path_factory.mktemp("embed") / request.param)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=[{}, CHUNKED], ids=["whole", "chunked"])
def embedder(request: pytest.FixtureRequest, folder: Path) -> Embedder:
    return Embedder(folder, **request.param)


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "embedder" in request.fixturenames:
        engine = request.getfixturevalue("embedder").engine
        report = engine.pool.check_integrity()
        assert (report.problem, report.referenced, engine.num_live, len(engine._pooler._sums)) == ("", 0, 0, 0)


@pytest.mark.parametrize("params", [LAST, MEAN, EmbedParams(Pooling.LAST, False), EmbedParams(Pooling.MEAN, False)])
def test_embeddings_are_the_models_own_hidden_states(embedder: Embedder, theirs: Any, params: EmbedParams) -> None:
    for _ in ("computed", "from the prefix cache"):
        for prompt, got in zip(PROMPTS, embedder.embed(PROMPTS, params), strict=True):
            wanted = reference(theirs, prompt, params)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
            assert len(got) == embedder.engine.info.hidden_size


def test_a_prefix_hit_serves_last_pooling_and_never_mean(embedder: Embedder) -> None:
    prompt = [5 + position % 90 for position in range(70)]
    embedder.embed([prompt], LAST)
    last, mean = embedder.submit(prompt, LAST), embedder.submit(prompt, MEAN)
    embedder.collect([last, mean])
    assert (embedder.cached_tokens(last), embedder.cached_tokens(mean)) == (64, 0)


def test_another_tenants_cache_is_not_used(embedder: Embedder) -> None:
    prompt = [9 + position % 90 for position in range(40)]
    embedder.embed([prompt], MEAN)
    other = embedder.submit(prompt, LAST, salt="tenant")
    embedder.collect([other])
    assert embedder.cached_tokens(other) == 0


def test_embedding_beside_generation_changes_neither(embedder: Embedder, theirs: Any) -> None:
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    prompts = [[7, 8, 9] * 15, [11, 12] * 4]
    alone = embedder.generate(prompts, sampling)
    sequences = [embedder.submit(prompt, MEAN) for prompt in PROMPTS]
    assert embedder.generate(prompts, sampling) == alone
    for prompt, got in zip(PROMPTS, embedder.collect(sequences), strict=True):
        torch.testing.assert_close(got, reference(theirs, prompt, MEAN), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_an_abort_in_any_state_frees_the_blocks(folder: Path, steps: int) -> None:
    embedder = Embedder(folder, **CHUNKED)
    sequence = embedder.submit(list(range(3, 63)), MEAN)
    for _ in range(steps):
        embedder.engine.step()
    embedder.engine.abort(sequence)
    if sequence.table is not None:
        sequence.table.release()
    assert (embedder.engine.pool.check_integrity().referenced, embedder.engine.num_live) == (0, 0)
    assert not embedder.engine.has_work


def test_a_failed_step_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = Embedder(folder)
    sequence = embedder.submit([5, 6, 7], LAST)
    monkeypatch.setattr(embedder.engine._runner, "run", lambda plan: 1 / 0)
    embedder.run()
    assert isinstance(embedder.emissions[-1][1], Failed)
    assert sequence.table is not None
    sequence.table.release()


def test_limits(embedder: Embedder) -> None:
    limit, vocabulary = embedder.engine.info.max_model_len, embedder.engine.info.vocab_size
    assert len(embedder.embed([[5] * limit], MEAN)) == 1, "the whole length: nothing is generated after it"
    for prompt, words in [([], "empty"), ([vocabulary], "vocabulary"), ([5] * (limit + 1), f"limit is {limit}")]:
        with pytest.raises(InvalidRequest, match=words):
            embedder.submit(prompt, LAST)
