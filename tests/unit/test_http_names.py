"""Errors about fields, told by the names that the client used."""

from __future__ import annotations

import pytest

from router.doors.http.failures import named_as_sent
from tandem.errors import InvalidRequest

NAMES = {"user_tag": "user", "max_tokens": "max_completion_tokens", "prompt": "messages"}


def told(error: InvalidRequest, names: dict[str, str]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught, named_as_sent(names):
        raise error
    return caught.value


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("max_tokens must be 1 or more, not 0", "max_completion_tokens must be 1 or more, not 0"),
        ("min_tokens must be in [0, max_tokens=2], not 3", "min_tokens must be in [0, max_completion_tokens=2], not 3"),
        (
            "prompt (9) + max_tokens (5) is over the model's 8 tokens",
            "messages (9) + max_completion_tokens (5) is over the model's 8 tokens",
        ),
        (
            "the model's limit and max_tokens (5)",
            "the model's limit and max_completion_tokens (5)",
        ),
        ("user_tag must be a str, not 'max_tokens=5'", "user must be a str, not 'max_tokens=5'"),
    ],
)
def test_ours_become_the_client_s(said: str, wanted: str) -> None:
    error = told(InvalidRequest(said, field="max_tokens"), NAMES)
    assert (error.message, error.field) == (wanted, "max_completion_tokens")


@pytest.mark.parametrize(
    "quoted", ["'max_tokens=5'", '"it\'s max_tokens=5"', "['a', 'max_tokens=5...", "'max_tokens (..."]
)
def test_what_the_client_wrote_stays(quoted: str) -> None:
    error = InvalidRequest(f"logit_bias must be keyed by token ids, not {quoted}", field="logit_bias")
    assert told(error, NAMES) is error


@pytest.mark.parametrize("field", [None, "max_tokens"])
def test_nothing_is_called_otherwise(field: str | None) -> None:
    error = InvalidRequest("max_tokens must be in [0, max_tokens=2]", field=field)
    assert told(error, {}) is error
