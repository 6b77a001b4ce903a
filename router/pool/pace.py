"""How fast workers are, as measured: a request that cannot meet its deadline is refused by it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from tandem.errors import Overloaded

# What is shorter says too little, and is counted in with what follows: prompts that end in one step, steps that come in
# one packet.
SHORTEST_S = 0.02
# First tokens that come so close to each other, as a share of the time before them, are taken to be of one step.
SAME_STEP = 0.02
# A pace that nothing has been measured of for this long is forgotten: what slowed the worker down may be over, and a
# service that refuses must find out.
STALE_S = 5.0
# What stands before a request takes longer than it is said to: others are served in between, and the pace varies.
MARGIN = 1.25
# How many of the latest ones have most of the weight.
PROMPTS, STEPS, ANSWERS = 4, 64, 64
# Variance of log n: where n hardly varied, its influence is not known, and is taken for none.
LEAST_VARIANCE = 0.02


class PrefillPace:
    """The prompts that a worker has, and how many tokens a second it gets through while it has some.

        sent ──its first token: computed──▶ over
          └── anything else: dropped ──▶ over

    What is measured lies between two first tokens, while there was work. The first one's own time holds all that is no
    work, and that others may be computed beside it: it tells how slow the worker is at most.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        # Tokens to compute, by request.
        self._sent: dict[str, int] = {}
        # When the worker got work, and when the last first token came of it, if one did.
        self._busy_from_s = self._last_s = -math.inf
        # Measured, of the latest step; and how long that took, measured or not.
        self._tokens, self._busy_s, self._step_s = 0, 0.0, 0.0
        # Logarithm of the seconds that a token took before, while it is known, and as of when.
        self._token_log_s: float | None = None
        self._measured_s = -math.inf

    def sent(self, key: str, tokens: int) -> None:
        if not self._sent:
            self._busy_from_s, self._last_s = self._clock(), -math.inf
            self._take_in()
        self._sent[key] = tokens

    def computed(self, key: str) -> None:
        """Its tokens count as they were sent, whatever the worker's cache saved: so do those of the queue."""
        if key in self._sent:
            self._note(self._sent[key])
        self.dropped(key)

    def dropped(self, key: str) -> None:
        """Does nothing for what is over."""
        self._sent.pop(key, None)

    def _note(self, tokens: int) -> None:
        now_s = self._clock()
        first, passed_s = self._last_s < self._busy_from_s, now_s - max(self._last_s, self._busy_from_s)
        self._last_s = now_s
        together = not first and passed_s < min(SHORTEST_S, SAME_STEP * self._step_s)
        if not together:
            self._step_s = passed_s
            self._take_in()
        if first:
            if passed_s < self._seconds(tokens, now_s):
                self._token_log_s, self._measured_s = self._averaged(passed_s / tokens), now_s
        elif self._busy_s or not together:
            self._tokens, self._busy_s, self._measured_s = self._tokens + tokens, self._busy_s + passed_s, now_s

    def _take_in(self) -> None:
        """What is too short goes on."""
        if self._busy_s >= SHORTEST_S:
            self._token_log_s = self._with_latest()
            self._tokens, self._busy_s = 0, 0.0

    def _with_latest(self) -> float | None:
        if self._busy_s < SHORTEST_S or not self._tokens:
            return self._token_log_s
        return self._averaged(self._busy_s / self._tokens)

    def _averaged(self, token_s: float) -> float:
        """A slow prompt is forgotten as soon as a quick one: the mean is of logarithms."""
        seen = math.log(max(token_s, 1e-9))
        return seen if self._token_log_s is None else self._token_log_s + (seen - self._token_log_s) / PROMPTS

    @property
    def queued_tokens(self) -> int:
        return sum(self._sent.values())

    def seconds(self, tokens: int) -> float:
        """Seconds that so many tokens take; 0 while nothing is known."""
        now_s = self._clock()
        expected_s = self._seconds(tokens, now_s)
        if not self._sent:
            return expected_s
        # A worker that is stuck is slow now, not only when its prompts end: what it has may take as long again.
        stuck_s = now_s - max(self._last_s, self._busy_from_s)
        return max(expected_s, stuck_s * min(1.0, tokens / self.queued_tokens))

    def _seconds(self, tokens: int, now_s: float) -> float:
        if now_s - self._measured_s > STALE_S:
            self._token_log_s, self._tokens, self._busy_s = None, 0, 0.0
        token_log_s = self._with_latest()
        return 0.0 if token_log_s is None else tokens * math.exp(token_log_s)

    def check(self, tokens: int, remaining_s: float) -> None:
        """tokens: to compute now, those before them included. Raises Overloaded when that is too late."""
        needed_s = self.seconds(tokens) if self._sent else 0.0
        if needed_s > remaining_s:
            words = f"its prompt would be computed in about {needed_s:.2g} s; its deadline is in {remaining_s:.2g} s"
            raise Overloaded(words, retry_after_ms=_retry_ms(needed_s - remaining_s))


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
    """How much of the output that they may have answers turned out to have, lately.

    Long answers are those that are cut, mostly by their deadline. Without them the share is too small; so it is if what
    they had counts as all that they would have had. They are censored lives: as a mean life is the time in service of
    all over the number that ended, so is this the tokens of all answers over what those might have that ended by
    themselves. No bias is left where the rest of an answer does not depend on how long it is already.
    """

    def __init__(self) -> None:
        self._had = self._allowed = 0.0

    def ended(self, tokens: int, max_tokens: int) -> None:
        """max_tokens: 0 for an answer that was cut."""
        if not tokens:
            return
        self._had = self._had * (1 - 1 / ANSWERS) + tokens
        self._allowed = self._allowed * (1 - 1 / ANSWERS) + max_tokens

    def expected(self, max_tokens: int) -> float:
        """0 while nothing is known. While none has ended by itself: all."""
        return min(1.0, self._had / max(self._allowed, 1e-9)) * max_tokens


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
