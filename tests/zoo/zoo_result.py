"""What a trial came to, as it travels between processes and into the table."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    EXACT = "exact"
    REFUSED = "refused"
    # A fault of Tandem's.
    WRONG = "wrong"
    CRASHED = "crashed"
    HUNG = "hung"
    # transformers makes no such model, or does not generate with it.
    NO_MODEL = "no model"
    # The answers would be no evidence.
    DULL = "dull"


GOOD = (Outcome.EXACT, Outcome.REFUSED, Outcome.NO_MODEL)


@dataclass(frozen=True)
class Result:
    architecture: str
    feature: str
    outcome: str
    # The refusal, or what was found, in one line.
    words: str = ""
