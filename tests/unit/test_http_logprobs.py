"""Log probabilities as JSON can have them."""

from __future__ import annotations

import json
import math

import pytest

from router.doors.http.answers import LEAST_LOGPROB, AnswerShape, ChatShape, ChoiceProgress, CompletionShape
from tandem.types import Token


@pytest.mark.parametrize("shape", [ChatShape(None, True), CompletionShape(None, True)])
@pytest.mark.parametrize(("logprob", "wanted"), [(-0.5, -0.5), (-math.inf, LEAST_LOGPROB), (math.nan, LEAST_LOGPROB)])
def test_what_a_model_holds_for_impossible_has_a_number(shape: AnswerShape, logprob: float, wanted: float) -> None:
    token = Token(5, logprob, ((5, logprob), (6, -math.inf)))
    choice = shape.choice(ChoiceProgress(tokens=[token]))
    found = json.dumps(choice["logprobs"], allow_nan=False)
    assert found.count(f"{wanted}") >= 2
    assert f"{LEAST_LOGPROB}" in found
