"""What Prometheus reads at /metrics: how requests fared, through whatever door, and how the service stands now."""

from __future__ import annotations

import time
from collections import Counter as Count
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from router.doors.http.answers import SPANS
from router.life.request import Orchestrator
from router.pool.registry import Registry
from router.pool.worker import Worker
from tandem.errors import TandemError
from tandem.timeline import Phase
from tandem.types import ChoiceFinished

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
# "queue", "prefill", "handoff" and so on; the two totals have histograms of their own.
_PHASES = {name.removesuffix("_ms"): span for name, span in SPANS.items() if name not in ("ttft_ms", "total_ms")}
# Name, help text, value.
_OF_A_WORKER: tuple[tuple[str, str, Callable[[Worker], float]], ...] = (
    ("up", "1 while requests can be placed on it.", lambda worker: worker.routable),
    ("draining", "1 while it takes no new work.", lambda worker: worker.draining),
    ("heartbeat_age_seconds", "Since it was heard last.", lambda worker: time.monotonic() - worker.reported.at_s),
    ("kv_blocks", "Blocks of its pool.", lambda worker: worker.reported.hello.total_blocks),
    ("kv_blocks_free", "Of them free.", lambda worker: worker.load.free_blocks),
    ("kv_blocks_quarantined", "Of ended requests, still written into.", lambda worker: worker.load.quarantined_blocks),
    ("queued_prompt_tokens", "Prompt tokens not yet computed.", lambda worker: worker.load.queued_prompt_tokens),
    ("waiting_prefills", "Prompts that wait.", lambda worker: worker.load.waiting_prefills),
    ("running_decodes", "Sequences that it decodes.", lambda worker: worker.load.running_decodes),
    ("reservations", "Requests that hold its blocks.", lambda worker: worker.load.reservations),
    ("waiting_reservations", "Requests that wait for its blocks.", lambda worker: worker.load.waiting_reservations),
)
# Fields of tandem.v1.Load that count since the worker started.
_COUNTED = (("out_of_memory", "Steps that its device had no room for."),)
# Fields of tandem.v1.KVTraffic, which count since the worker started.
_OF_KV = (
    ("transfers", "Sealed transfers."),
    ("failures", "Transfers that ended in another way."),
    ("bytes", "KV moved."),
    ("frames", "Frames moved."),
    ("seconds", "Of sealed transfers: the sender's work, the receiver's time from opening to seal."),
    ("hidden_seconds", "Of the sender's, those while prefill still ran."),
    ("corrupt_frames", "Frames that failed a checksum."),
)


class Metrics:
    """An observer of the orchestrator (router/life/request.py)."""

    def __init__(self, orchestrator: Orchestrator, registry: Registry) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests by how they ended: ok, or the error's code.", "outcome")
        words = "Attempts that failed and were followed by another, by the error's code and the way that the KV went."
        self._retries = self._counter("retried_attempts", words, "reason", "transport")
        self._output_tokens = self._counter("output_tokens", "Tokens of answers that ended well.")
        self._kv_bytes = self._counter("kv_transferred_bytes", "KV of answers that ended well.", "transport")
        self._ttft = self._histogram("ttft", "From receiving a request to its first token.", _SECONDS)
        self._tpot = self._histogram("tpot", "Between an answer's first and last token, a token.", _TOKEN_SECONDS)
        self._e2e = self._histogram("e2e", "From receiving a request to an answer's end.", _SECONDS)
        self._phases = Histogram(
            "tandem_phase_seconds", "Phases of answers.", ["phase"], buckets=_SECONDS, registry=self._registry
        )
        self._registry.register(Standing(orchestrator, registry))

    def _counter(self, name: str, words: str, *labels: str) -> Counter:
        return Counter(f"tandem_{name}", words, labels, registry=self._registry)

    def _histogram(self, name: str, words: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"tandem_{name}_seconds", words, buckets=buckets, registry=self._registry)

    def ended(self, outcome: str) -> None:
        self._requests.labels(outcome).inc()

    def retried(self, reason: TandemError, transport: str) -> None:
        self._retries.labels(reason.code, transport).inc()

    def answered(self, finished: ChoiceFinished) -> None:
        timeline, tokens = finished.report.timeline, finished.output_tokens
        self._output_tokens.inc(tokens)
        _observe(self._ttft, timeline.between_ms(Phase.RECEIVED, Phase.FIRST_TOKEN))
        _observe(self._e2e, timeline.between_ms(Phase.RECEIVED, Phase.FINISHED))
        decoding_ms = timeline.between_ms(Phase.FIRST_TOKEN, Phase.FINISHED)
        if decoding_ms is not None and tokens > 1:
            _observe(self._tpot, decoding_ms / (tokens - 1))
        for phase, span in _PHASES.items():
            _observe(self._phases.labels(phase), timeline.between_ms(*span))
        if finished.report.kv_bytes:
            self._kv_bytes.labels(finished.report.transport).inc(finished.report.kv_bytes)

    def page(self) -> bytes:
        return generate_latest(self._registry)


def _observe(histogram: Histogram, span_ms: float | None) -> None:
    if span_ms is not None:
        histogram.observe(span_ms / 1000)


class Standing:
    """What is so at the moment of asking, and what workers count themselves."""

    def __init__(self, orchestrator: Orchestrator, registry: Registry) -> None:
        self._orchestrator = orchestrator
        self._workers = registry

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("tandem_live_requests", "Accepted and not ended.", len(self._orchestrator.live))
        family = GaugeMetricFamily("tandem_live_choices", "Live answers by the phase they reached.", labels=["phase"])
        phases = Count(job.phase for live in self._orchestrator.live for job in live.jobs)
        for phase in Phase:
            family.add_metric([phase], phases[phase])
        yield family
        yield from self._by_worker()
        yield from self._kv_counters()

    def _by_worker(self) -> Iterator[Metric]:
        workers = self._workers.workers
        for name, words, value in _OF_A_WORKER:
            family = GaugeMetricFamily(f"tandem_worker_{name}", words, labels=["worker", "roles"])
            for worker in workers:
                family.add_metric([worker.id, "+".join(sorted(worker.roles))], value(worker))
            yield family
        for field, words in _COUNTED:
            counter = CounterMetricFamily(f"tandem_worker_{field}", words, labels=["worker", "roles"])
            for worker in workers:
                counter.add_metric([worker.id, "+".join(sorted(worker.roles))], getattr(worker.load, field))
            yield counter

    def _kv_counters(self) -> Iterator[Metric]:
        for field, words in _OF_KV:
            labels = ["worker", "direction", "transport"]
            family = CounterMetricFamily(f"tandem_worker_kv_{field}", words, labels=labels)
            for worker in self._workers.workers:
                moved = {"sent": worker.load.kv_sent, "received": worker.load.kv_received}
                for direction, by_transport in moved.items():
                    for transport, traffic in by_transport.items():
                        family.add_metric([worker.id, direction, transport], getattr(traffic, field))
            yield family
