"""How fast workers are, as measured: by which a request is refused that cannot meet its deadline."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from tandem.errors import Overloaded

# What is shorter says too little, and is counted in with what follows: prompts that end in one step, steps that come in
# one packet.
SHORTEST_S = 0.02
# Of the time before them: first tokens that come so close to each other are taken to be of one step.
SAME_STEP = 0.02
# A pace that nothing has been measured of for this long, and that nobody is measuring, is forgotten: whatever slowed
# the worker down may be over, and a service that refuses must find out.
STALE_S = 5.0
# What stands before a request takes longer than it is said to: others are served in between, and the pace varies.
MARGIN = 1.25
# How many of the latest ones have most of the weight.
PROMPTS, STEPS, ANSWERS = 4, 64, 64
# Of log n: where n hardly varied, its influence is not known, and is taken for none.
LEAST_VARIANCE = 0.02


class PrefillPace:
    """The prompts that a worker is to compute, and how many tokens a second it gets through while it has some.

    placed ──sent──▶ with the worker ──its first token: computed──▶ over
       └───────────────────┴── anything else: dropped ──▶ over
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        # Tokens to compute, by request; of those that are with the worker the oldest first.
        self._placed: dict[str, int] = {}
        self._sent: dict[str, int] = {}
        # Since when, while it has some, busy time is not counted in; else when it had the last one.
        self._at_s = -math.inf
        # Of the latest, which others may have ended together with.
        self._tokens, self._busy_s = 0, 0.0
        # Logarithm of the seconds that a token took before; None while it is not known.
        self._token_log_s: float | None = None

    def placed(self, key: str, tokens: int) -> None:
        self._placed[key] = tokens

    def sent(self, key: str) -> None:
        now_s = self._clock()
        if not self._sent:
            if self._forgotten(now_s):
                self._token_log_s, self._tokens, self._busy_s = None, 0, 0.0
            self._at_s = now_s
        self._sent[key] = self._placed[key]

    def computed(self, key: str, tokens: int) -> None:
        if key in self._sent:
            self._note(tokens)
        self._forget(key)

    def dropped(self, key: str) -> None:
        """Does nothing for what is over."""
        self.computed(key, 0)

    def _forget(self, key: str) -> None:
        self._placed.pop(key, None)
        self._sent.pop(key, None)

    def _note(self, tokens: int) -> None:
        now_s = self._clock()
        passed_s, self._at_s = now_s - self._at_s, now_s
        if self._busy_s >= SHORTEST_S and passed_s >= min(SHORTEST_S, SAME_STEP * self._busy_s):
            self._token_log_s = self._with_latest()
            self._tokens, self._busy_s = 0, 0.0
        self._tokens, self._busy_s = self._tokens + tokens, self._busy_s + passed_s

    def _with_latest(self) -> float | None:
        if self._busy_s < SHORTEST_S or not self._tokens:
            return self._token_log_s
        # In logarithms, a slow prompt is forgotten as soon as a quick one.
        seen = math.log(self._busy_s / self._tokens)
        return seen if self._token_log_s is None else self._token_log_s + (seen - self._token_log_s) / PROMPTS

    @property
    def queued_tokens(self) -> int:
        return sum(self._placed.values())

    def seconds(self, tokens: int) -> float:
        """That so many tokens take; 0 while nothing is known."""
        now_s, token_log_s = self._clock(), self._with_latest()
        if token_log_s is None or self._forgotten(now_s):
            return 0.0
        return tokens * max(math.exp(token_log_s), self._at_least(now_s))

    def check(self, key: str, remaining_s: float) -> None:
        """Of one that is placed and about to be sent. Raises Overloaded when it would be computed too late."""
        needed_s = self.seconds(self._placed[key]) if self._sent else 0.0
        if needed_s > remaining_s:
            words = (
                f"it waited for KV blocks, its prompt takes about {needed_s:.2g} s, and {remaining_s:.2g} s are left"
            )
            raise Overloaded(words, retry_after_ms=_retry_ms(needed_s - remaining_s))

    def _at_least(self, now_s: float) -> float:
        """A worker that is stuck is slow from now on, not from the end of its prompt on."""
        if not self._sent:
            return 0.0
        under_way = next(iter(self._sent.values()))
        return (now_s - self._at_s) / under_way

    def _forgotten(self, now_s: float) -> bool:
        return not self._sent and now_s - self._at_s > STALE_S


class DecodePace:
    """Seconds between two tokens of an answer: gap = a * n ** b, with n answers that are decoded at once.

    a and b are fitted to a worker's latest steps, in logarithms. b is in [0, 1]: one answer more takes no time from the
    others, or its share of all.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        # The last step, and how many answers went on after it.
        self._at_s, self._decoding = -math.inf, 0
        # Steps that are too short to say anything by themselves.
        self._passed_s, self._tokens, self._answers = 0.0, 0, 0.0
        # Faded sums over steps: of 1, log n, log gap, (log n)**2, log n * log gap.
        self._sums = [0.0] * 5

    def stepped(self, tokens: int, decoding: int) -> None:
        """A step brought these tokens; decoding: answers that go on after it."""
        now_s = self._clock()
        if self._decoding:
            self._note(now_s - self._at_s, tokens)
        elif self._forgotten(now_s):
            self._sums = [0.0] * 5
        self._at_s, self._decoding = now_s, decoding

    def _note(self, passed_s: float, tokens: int) -> None:
        self._passed_s += passed_s
        self._tokens += tokens
        self._answers += passed_s * self._decoding
        if self._passed_s < SHORTEST_S or not self._tokens:
            return
        x, y = math.log(self._answers / self._passed_s), math.log(self._answers / self._tokens)
        seen = (1.0, x, y, x * x, x * y)
        self._sums = [total * (1 - 1 / STEPS) + new for total, new in zip(self._sums, seen, strict=True)]
        self._passed_s, self._tokens, self._answers = 0.0, 0, 0.0

    def gap_s(self, answers: int) -> float:
        """When so many answers are decoded at once; 0 while nothing is known."""
        weight, x, y, xx, xy = self._sums
        if weight == 0 or self._forgotten(self._clock()):
            return 0.0
        x, y = x / weight, y / weight
        slope = (xy / weight - x * y) / (xx / weight - x * x + LEAST_VARIANCE)
        return math.exp(y + min(max(slope, 0.0), 1.0) * (math.log(answers) - x))

    def _forgotten(self, now_s: float) -> bool:
        return self._decoding == 0 and now_s - self._at_s > STALE_S


class OutputShare:
    """How much of the output that they may have answers turned out to have, lately."""

    def __init__(self) -> None:
        self._had = self._allowed = 0.0

    def ended(self, tokens: int, max_tokens: int) -> None:
        self._had = self._had * (1 - 1 / ANSWERS) + tokens
        self._allowed = self._allowed * (1 - 1 / ANSWERS) + max_tokens

    def expected(self, max_tokens: int) -> float:
        return max_tokens * self._had / self._allowed if self._allowed else 0.0


@dataclass(frozen=True)
class Ahead:
    """What a request would meet on the two workers that it would be placed on now."""

    prefill: PrefillPace
    decode: DecodePace
    # Answers that are placed on the decode worker, and those that it decodes now.
    placed: int
    decoding: int
    # Blocks that its pool has too few of, as a share of the pool.
    missing: float


def check_deadline(ahead: Ahead, prompt_tokens: int, output_tokens: float, answers: int, remaining_s: float) -> None:
    """prompt_tokens: to compute; output_tokens: that each of its answers is expected to have.

    Raises Overloaded when the answers would come too late. With nothing ahead of it a request is never refused: it may
    find that the workers have become faster.
    """
    queued = ahead.prefill.queued_tokens
    if not (queued or ahead.placed):
        return
    gaps = max(0.0, output_tokens - 1)
    alone_s = ahead.prefill.seconds(prompt_tokens) + gaps * ahead.decode.gap_s(1)
    live = ahead.decoding if ahead.missing else ahead.placed + answers
    decode_s = gaps * ahead.decode.gap_s(max(1, live)) * (1 + ahead.missing)
    whole_s = ahead.prefill.seconds(queued + prompt_tokens * answers) + decode_s
    needed_s = alone_s + MARGIN * max(0.0, whole_s - alone_s)
    if needed_s > remaining_s:
        words = (
            f"with what is ahead of it, it would take about {needed_s:.2g} s; its deadline is in {remaining_s:.2g} s"
        )
        raise Overloaded(words, retry_after_ms=_retry_ms(needed_s - remaining_s))


def _retry_ms(late_s: float) -> int:
    """When what is too much by now will have been worked off, if nothing else comes."""
    return round(1000 * min(max(late_s, 0.1), 60.0))
