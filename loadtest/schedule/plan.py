"""What is asked for, checked at once; and the schedule that it makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from loadtest.runner import Arrival
from loadtest.schedule import arrivals, traces, workloads
from loadtest.targets.target import Served
from tandem.errors import ConfigError, InvalidRequest
from tandem.types import MAX_INT32, SamplingParams, shown

Workload = Literal["random", "mooncake", "azure"]

# For an endpoint that does not say how many token ids it knows: any model has so many.
ASSUMED_VOCAB_SIZE = 256
MAX_REQUESTS = 1_000_000
# All prompts of a schedule are made before it starts: 4 bytes each.
MAX_PROMPT_TOKENS = 1 << 28


@dataclass(frozen=True)
class Plan:
    """Raises ConfigError, naming the option, for what makes no sense."""

    workload: Workload = "random"
    num_prompts: int = 100
    lengths: workloads.Lengths = field(default_factory=lambda: workloads.Lengths(1024, 128))
    # The workload's file; without one, Mooncake's is made up.
    trace: Path | None = None
    scale_lengths: float = 1.0
    # Above 1 slows a trace down.
    scale_time: float = 1.0
    # Seconds, in the trace's time; None: the step of the trace's own clock.
    jitter_s: float | None = None
    # Requests a second; None: as fast as can be, or a trace's own times.
    request_rate: float | None = None
    burstiness: float = 1.0
    ramp_up: arrivals.RampUp | None = None
    seed: int = 0
    # Token ids to draw from; None: what the target says.
    vocab_size: int | None = None
    # Longest prompt and output together; None: what the target says.
    max_model_len: int | None = None

    def __post_init__(self) -> None:
        require(self.workload in get_args(Workload), "workload", "random, mooncake or azure", self.workload)
        require(1 <= self.num_prompts <= MAX_REQUESTS, "num_prompts", f"in [1, {MAX_REQUESTS}]", self.num_prompts)
        for name in ("scale_lengths", "scale_time"):
            require(is_positive(getattr(self, name)), name, "a number above 0", getattr(self, name))
        jitter_ok = self.jitter_s is None or (self.jitter_s >= 0 and math.isfinite(self.jitter_s))
        require(jitter_ok, "jitter", "0 seconds or more", self.jitter_s)
        for name in ("request_rate", "burstiness"):
            value = getattr(self, name)
            require(value is None or value > 0, name, "above 0", value)
        require(0 <= self.seed < 2**32, "seed", "in [0, 2^32)", self.seed)
        for name in ("vocab_size", "max_model_len"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "1 or more", value)
            require(value is None or value <= MAX_INT32, name, f"at most {MAX_INT32}", value)
        self._check_lengths()
        self._check_ramp_up()
        self._check_combination()

    def _check_lengths(self) -> None:
        lengths = self.lengths
        for name, low in (("input_tokens", 1), ("output_tokens", 1), ("prefix_tokens", 0)):
            value = getattr(lengths, name)
            option = name.replace("_tokens", "_len")
            require(low <= value <= traces.MAX_TRACE_TOKENS, option, f"in [{low}, {traces.MAX_TRACE_TOKENS}]", value)
        require(0 <= lengths.range_ratio < 1, "range_ratio", "in [0, 1)", lengths.range_ratio)

    def _check_ramp_up(self) -> None:
        if self.ramp_up is not None:
            for name in ("start_rps", "end_rps"):
                value = getattr(self.ramp_up, name)
                require(is_positive(value), f"ramp_up_{name}", "a number above 0", value)

    def _check_combination(self) -> None:
        if self.workload == "random" and self.trace is not None:
            raise ConfigError("--trace belongs to --workload mooncake or azure", field="trace")
        if self.workload == "azure" and self.trace is None:
            raise ConfigError("--workload azure needs --trace FILE", field="trace")
        if self.workload == "random" and self.scale_lengths != 1:
            raise ConfigError("--scale-lengths belongs to --workload mooncake or azure", field="scale_lengths")
        for name, moves in (("scale_time", self.scale_time != 1), ("jitter", bool(self.jitter_s))):
            if moves and self.has_rate:
                words = "moves the arrivals of a trace: it needs --workload mooncake or azure, and no rate"
                raise ConfigError(f"--{name.replace('_', '-')} {words}", field=name)
        if self.trace is not None:
            traces.check_readable(self.trace)
        if self.ramp_up is not None and self.request_rate is not None:
            raise ConfigError("a ramp-up has its own rates: leave --request-rate out", field="request_rate")

    @property
    def has_rate(self) -> bool:
        """Whether arrivals are drawn, not replayed from a trace."""
        return self.workload == "random" or self.request_rate is not None or self.ramp_up is not None

    @property
    def _rate_rps(self) -> float:
        return math.inf if self.request_rate is None else self.request_rate

    @property
    def source(self) -> str:
        """Where the lengths come from, in a word."""
        return "drawn" if self.workload == "random" else self.trace.name if self.trace else "made up"

    def as_json(self) -> dict[str, Any]:
        """What vLLM's result files say of the load, and what a trace adds."""
        found: dict[str, Any] = {
            "num_prompts": self.num_prompts,
            # None: a trace's own times.
            "request_rate": _json_number(self._rate_rps) if self.has_rate else None,
            "burstiness": _json_number(self.burstiness),
            "workload": self.workload,
            "source": self.source,
            "seed": self.seed,
        }
        if self.ramp_up is not None:
            found |= {
                "ramp_up_strategy": self.ramp_up.strategy,
                "ramp_up_start_rps": self.ramp_up.start_rps,
                "ramp_up_end_rps": self.ramp_up.end_rps,
            }
        if self.workload == "random":
            return found | vars(self.lengths)
        return found | {"scale_lengths": self.scale_lengths, "scale_time": self.scale_time, "jitter_s": self._jitter_s}

    @property
    def _jitter_s(self) -> float:
        if self.jitter_s is not None or self.workload == "random":
            return self.jitter_s or 0.0
        # What is made up has an exact clock.
        return 0.0 if self.trace is None else traces.CLOCK_STEP_S[self.workload]

    def schedule(self, served: Served) -> Schedule:
        """Raises ConfigError for a trace that cannot be read, for token ids that the model does not know, or when no
        request fits it.
        """
        known = served.vocab_size
        if self.vocab_size is not None and known is not None:
            limit = f"at most {known}, as many token ids as {served.model} knows"
            require(self.vocab_size <= known, "vocab_size", limit, self.vocab_size)
        vocabulary = workloads.Vocabulary(self.vocab_size or known or ASSUMED_VOCAB_SIZE, self.seed)
        if self.workload == "random":
            rows: list[traces.TraceRow] = []
            _check_size((self.lengths.input_tokens + self.lengths.prefix_tokens) * self.num_prompts)
            requests = workloads.random_requests(self.num_prompts, self.lengths, vocabulary)
        else:
            if self.trace is None:
                rows = traces.made_up(self.num_prompts, self.seed)
            else:
                rows = traces.read_trace(self.workload, self.trace, self.num_prompts)
            _check_size(sum(row.input_tokens for row in rows) * self.scale_lengths)
            requests = workloads.trace_requests(rows, self.scale_lengths, vocabulary)
        every = [Arrival(float(at), each) for at, each in zip(self._times(rows), requests, strict=True)]
        return _fitting(
            sorted(every, key=lambda arrival: arrival.at_s), self.max_model_len or served.max_model_len, vocabulary
        )

    def _times(self, rows: Sequence[traces.TraceRow]) -> arrivals.Times:
        if not self.has_rate:
            return arrivals.replayed([row.at_s for row in rows], self.scale_time, self._jitter_s, self.seed)
        count = len(rows) or self.num_prompts
        return arrivals.drawn(count, self._rate_rps, self.burstiness, self.seed, self.ramp_up)


@dataclass(frozen=True)
class Schedule:
    arrivals: list[Arrival]
    vocabulary: workloads.Vocabulary
    # Requests that are longer than the model allows.
    left_out: int = 0

    def warm_up(self, count: int) -> list[workloads.LoadRequest]:
        return workloads.warm_up_requests([arrival.request for arrival in self.arrivals], count, self.vocabulary)


def _fitting(every: list[Arrival], longest: int | None, vocabulary: workloads.Vocabulary) -> Schedule:
    fitting = [each for each in every if longest is None or each.request.total_tokens <= longest]
    if not fitting:
        raise ConfigError(
            f"every request is longer than the model's {longest} tokens; ask for shorter ones", field="max_model_len"
        )
    return Schedule(fitting, vocabulary, len(every) - len(fitting))


def _check_size(prompt_tokens: float) -> None:
    if prompt_tokens > MAX_PROMPT_TOKENS:
        raise ConfigError(
            f"{prompt_tokens:.0f} prompt tokens are more than the {MAX_PROMPT_TOKENS} that are held at once; "
            "ask for fewer or shorter prompts",
            field="num_prompts",
        )


def _json_number(value: float) -> float | str:
    """JSON has no infinity; vLLM writes it so."""
    return value if math.isfinite(value) else "inf"


def is_positive(value: float) -> bool:
    return value > 0 and math.isfinite(value)


def require(ok: bool, option: str, limit: str, value: object) -> None:
    """Raises ConfigError that names the option and its limit."""
    if not ok:
        name = option.replace("_", "-")
        raise ConfigError(f"--{name} must be {limit}, not {shown(value)}", field=option)


def parse_percentiles(text: str) -> tuple[float, ...]:
    """From `50,99.9`. Raises ConfigError."""
    try:
        values = tuple(float(each) for each in text.split(","))
    except ValueError:
        values = (math.nan,)
    require(all(0 <= value <= 100 for value in values), "percentiles", "numbers in [0, 100]", text)
    return values


def check_timeout(timeout_s: float) -> float:
    """Raises ConfigError unless it is a positive, finite number of seconds."""
    require(is_positive(timeout_s), "timeout", "a number of seconds above 0", timeout_s)
    return timeout_s


def check_temperature(temperature: float) -> float:
    """Raises ConfigError unless requests may have it."""
    try:
        return SamplingParams(temperature=temperature).temperature
    except InvalidRequest as error:
        raise ConfigError(f"--{error.message}", field="temperature") from None
