"""The report of a comparison, as text: what it says, and that it holds whatever users call their things."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from made_comparison import FOUR, OBJECTIVES, TWO, made_comparison, made_measured, made_run

from loadtest.compare.html import render
from loadtest.compare.model import Comparison, Measured, ServiceShape, ShownAnswer, ShownRun

NASTY = "</script><img src=x onerror=alert(1)>&\"'{{ 7*7 }}"
MAX_BYTES = 6_000_000


class Page(HTMLParser):
    """Elements with their attributes, the text that a reader sees, and the scripts."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self._within: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag in ("script", "style"):
            self._within.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._within and self._within[-1] == tag:
            self._within.pop()

    def handle_data(self, data: str) -> None:
        if self._within[-1:] == ["script"]:
            self.scripts[-1] += data
        elif not self._within:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def figures(self) -> dict[str, dict[str, Any]]:
        return {figure["id"]: figure for figure in json.loads(self.scripts[0])}

    @property
    def ids(self) -> set[str]:
        return {each["id"] or "" for _, each in self.elements if "id" in each}


@pytest.fixture(scope="module")
def two() -> Comparison:
    return made_comparison()


@pytest.fixture(scope="module")
def page(two: Comparison) -> Page:
    return Page(render(two))


def answerless(comparison: Comparison) -> Comparison:
    return comparison.model_copy(
        update={"measured": [each.model_copy(update={"shown": []}) for each in comparison.measured]}
    )


def test_it_says_the_verdict_first_and_what_was_compared(two: Comparison, page: Page) -> None:
    headline, lead = two.verdict.text[0].split(": ")
    lead = f"O{lead.removeprefix('o')}"
    at = [page.text.index(sentence) for sentence in (f"{headline}.", lead, *two.verdict.text[1:])]
    assert at == sorted(at)
    assert at[0] < page.text.index("Machine") < page.text.index("Good answers")
    for expected in (
        two.machine.processor,
        "2026-11-21 10:30 UTC",
        two.model,
        two.command,
        "TTFT ≤ 1200 ms and TPOT ≤ 45 ms",
    ):
        assert expected in page.text


def test_every_shape_is_named_in_each_table(two: Comparison, page: Page) -> None:
    rows = page.text[page.text.index("Good answers") :]
    for each in two.measured:
        assert rows.count(each.shape.name) > 5
        assert f"{each.best_rate_rps:.2f}" in rows


def test_every_draw_is_told(two: Comparison, page: Page) -> None:
    assert len(two.verdict.pairs) == 5
    for number, pair in enumerate(two.verdict.pairs, 1):
        assert f"{number} {pair.offered} {pair.split_good} {pair.colocated_good} {pair.ratio:.2f}" in page.text
    curves = page.figures["draws"]["data"]
    assert [len(curve["y"]) for curve in curves] == [5, 5]


def test_it_is_one_file_and_loads_nothing(two: Comparison, page: Page) -> None:
    source = render(two)
    assert len(source.encode()) < MAX_BYTES
    assert {tag for tag, _ in page.elements} & {"link", "iframe", "img", "object", "embed", "base"} == set()
    loads = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "action")
    ]
    assert loads == []
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_its_policy_admits_its_own_scripts_and_nothing_else(page: Page) -> None:
    policy = next(each["content"] for _, each in page.elements if each.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    digests = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in page.scripts[1:]]
    assert re.findall(r"'sha256-([^']+)'", policy) == digests


def test_every_figure_has_its_element(page: Page) -> None:
    assert set(page.figures) <= page.ids
    expected = {"draws", "attainment", "ttft-0", "tpot-1", "itl-0", "timeline-shape-0", "timeline-shape-1"}
    assert expected <= set(page.figures)


def test_what_users_wrote_is_text(two: Comparison) -> None:
    run = made_run(TWO[0], 2.0, count=12)
    named = [each.model_copy(update={"prefill_worker": NASTY, "decode_worker": NASTY}) for each in run.answers]
    use = [each.model_copy(update={"worker": NASTY}) for each in run.use]
    measured = Measured(
        shape=TWO[0],
        probes=[],
        best_rate_rps=0,
        shown=[run.model_copy(update={"answers": named, "use": use})],
    )
    changes: dict[str, Any] = dict.fromkeys(("command", "model", "date", "tandem_version"), NASTY)
    machine = two.machine.model_copy(update={"processor": NASTY, "device": NASTY})
    verdict = two.verdict.model_copy(update={"best_split": NASTY, "best_colocated": NASTY, "text": [NASTY, NASTY]})
    workload = {"workload": NASTY, "source": NASTY, NASTY: NASTY}
    changes |= {"machine": machine, "verdict": verdict, "workload": workload, "measured": [measured]}
    page = Page(render(two.model_copy(update=changes)))
    assert {"img"} & {tag for tag, _ in page.elements} == set()
    assert not any("onerror" in attributes for _, attributes in page.elements)
    assert page.text.count(" ".join(NASTY.split())) >= 8
    assert len(page.scripts) == 3
    # What plotly reads as HTML.
    assert "<img" not in json.dumps(page.figures)


def test_curves_have_few_points_and_keep_the_slowest() -> None:
    comparison = made_comparison(count=600)
    curves = [
        curve
        for name, figure in Page(render(comparison)).figures.items()
        if name.startswith(("ttft-", "tpot-", "itl-"))
        for curve in figure["data"]
    ]
    assert len(curves) == 2 * 2 * 3
    for curve in curves:
        assert 100 < len(curve["x"]) <= 500
        assert curve["x"] == sorted(curve["x"])
        assert curve["y"][-1] == 1


def test_many_shapes_have_looks_of_their_own() -> None:
    shapes = [*FOUR, *(ServiceShape(colocated=4, step_tokens=size) for size in (128, 256, 1024, 2048))]
    comparison = made_comparison(shapes, probes=(1.0, 2.0), shown=(1.0,), count=30)
    source = render(comparison)
    assert len(source.encode()) < MAX_BYTES
    curves = Page(source).figures["ttft-0"]["data"]
    looks = {(each["line"]["color"], each["line"]["dash"]) for each in curves}
    assert len(looks) == len(shapes) == len({each["name"] for each in curves})


def test_the_window_shows_a_prefill_that_delays_tokens_and_the_split_has_none(page: Page) -> None:
    colocated, split = (page.figures[f"timeline-shape-{index}"] for index in (0, 1))
    assert colocated["layout"]["shapes"]
    assert split["layout"]["shapes"] == []
    assert colocated["layout"]["xaxis"]["range"] == split["layout"]["xaxis"]["range"]
    found = re.search(
        r"Longest wait for a next token in the window: ([\d.]+) ms with 2 col.* against ([\d.]+) ms", page.text
    )
    assert found is not None
    assert float(found[1]) > 1.5 * float(found[2])
    assert "the same seconds of the same schedule" in page.text


def test_a_shape_that_kept_no_rate_is_said_so(two: Comparison) -> None:
    none = made_measured(TWO[1], probes=(30.0, 60.0), shown=())
    assert none.best_rate_rps == 0
    text = Page(render(two.model_copy(update={"measured": [two.measured[0], none]}))).text
    lowest = "Attainment and latencies are those at the lowest rate tried, 30.00 requests/s."
    assert f"1P1D: no rate that was tried kept 90%. {lowest}" in text


def test_a_shape_that_failed_has_no_draws(two: Comparison) -> None:
    failed = two.measured[0].model_copy(update={"failure": "workers died", "shown": [], "draws": []})
    page = Page(render(two.model_copy(update={"measured": [failed, two.measured[1]]})))
    assert f"{failed.shape.name}: failed and takes no part: workers died." in page.text
    assert [curve["name"] for curve in page.figures["draws"]["data"]] == ["1P1D"]


def test_an_interrupted_comparison_says_so(two: Comparison) -> None:
    nothing = [Measured(shape=shape, probes=[], best_rate_rps=0, shown=[]) for shape in TWO]
    for measured in (nothing, two.measured[:1], answerless(two).measured, []):
        text = Page(render(two.model_copy(update={"interrupted": True, "measured": measured}))).text
        assert "Interrupted." in text
        assert ("No answers were kept" in text) is not any(each.shown for each in measured)


def test_the_headline_of_an_interrupted_comparison_is_its_result(two: Comparison) -> None:
    verdict = two.verdict.model_copy(update={"text": ["It was cut off.", "Splitting pays: a lot.", "Why: so."]})
    source = render(two.model_copy(update={"interrupted": True, "verdict": verdict}))
    assert "<h1>Splitting pays.</h1>" in source
    assert "A lot." in source
    assert Page(source).text.index("It was cut off.") < Page(source).text.index("Why: so.")


def test_runs_that_were_stopped_early_look_other_than_whole_ones(two: Comparison, page: Page) -> None:
    stopped = sum(run.attainment < two.target_attainment for each in two.measured for run in each.probes)
    marks = [mark for curve in page.figures["attainment"]["data"][1::2] for mark in curve["marker"]["symbol"]]
    assert 0 < sum(mark.endswith("-open") for mark in marks) == stopped
    assert f"({stopped} of them stopped early)" in page.text


def test_workers_that_nobody_watched_have_no_use(two: Comparison) -> None:
    measured = made_measured(TWO[0], (1.0,), (1.0,), count=30)
    blind = measured.model_copy(
        update={
            "probes": [run.model_copy(update={"use": []}) for run in measured.probes],
            "draws": [],
        }
    )
    page = Page(render(two.model_copy(update={"measured": [blind]})))
    assert not [name for name in page.figures if name.startswith("use-")]
    assert "timeline-shape-0" in page.figures


def test_shapes_without_a_run_at_a_shared_rate_are_not_in_the_legend_there(two: Comparison) -> None:
    more = made_measured(ServiceShape(colocated=2, step_tokens=32), (1.0,), (), count=30)
    text = Page(render(two.model_copy(update={"measured": [*two.measured, more]}))).text
    latencies = text[text.index("Latencies") : text.index("What happens on the workers")]
    assert "Only these shapes ran at shared rates" in latencies
    assert more.shape.name not in latencies


def test_a_shape_that_did_not_run_at_every_shared_rate_is_said_so(two: Comparison) -> None:
    short = two.measured[0].model_copy(update={"shown": two.measured[0].shown[:1]})
    text = Page(render(two.model_copy(update={"measured": [short, two.measured[1]]}))).text
    assert text.count("Without 2 colocated, 64-token steps: no whole run with these arrivals at this rate.") == 1
    assert "of a run at 1.00 requests/s" in text
    cut = Page(render(two.model_copy(update={"measured": [short, two.measured[1]], "interrupted": True}))).text
    assert "at this rate; the comparison was cut off before it had ended." in cut


@pytest.mark.parametrize("words", ["longer", "as long"])
def test_a_split_that_waits_as_long_is_not_praised(two: Comparison, words: str) -> None:
    def late(run: ShownRun) -> ShownRun:
        answers = [
            each.model_copy(update={"arrivals_s": each.arrivals_s[:1] + each.arrivals_s[20:]}) for each in run.answers
        ]
        return run.model_copy(update={"answers": answers})

    colocated, split = two.measured
    shown = [late(run) for run in split.shown] if words == "longer" else colocated.shown
    split = split.model_copy(update={"shown": shown})
    text = Page(render(two.model_copy(update={"measured": [two.measured[0], split]}))).text
    assert f"So 1P1D waits {words} here" in text


def test_failed_answers_and_answers_without_marks_are_no_trouble(two: Comparison) -> None:
    def bare(answer: ShownAnswer) -> ShownAnswer:
        return answer.model_copy(update={"phases_ms": {}, "prefill_worker": "", "decode_worker": ""})

    def cut(answer: ShownAnswer) -> ShownAnswer:
        marks = {name: answer.phases_ms[name] for name in ("received", "admitted", "prefill_started", "first_token")}
        arrivals = answer.arrivals_s[:3]
        return answer.model_copy(update={"phases_ms": marks, "arrivals_s": arrivals, "failure": "cut", "met": False})

    def spoiled(run: ShownRun) -> ShownRun:
        kinds = (bare, cut, lambda answer: answer)
        return run.model_copy(update={"answers": [kinds[i % 3](each) for i, each in enumerate(run.answers)]})

    measured = [each.model_copy(update={"shown": [spoiled(run) for run in each.shown]}) for each in two.measured]
    measured.append(made_measured(ServiceShape(colocated=2, step_tokens=512), (1.0,), (1.0,), count=30, failures=30))
    page = Page(render(two.model_copy(update={"measured": measured})))
    names = {trace["name"] for trace in page.figures["timeline-shape-0"]["data"]}
    assert names >= {"queued", "prefill", "token", "unknown", "failed"}
    assert "count as missed: overloaded: 30." in page.text


def test_the_objectives_lie_on_the_curves(page: Page) -> None:
    for metric, limit_ms in (("ttft", OBJECTIVES["ttft"]), ("tpot", OBJECTIVES["tpot"]), ("itl", OBJECTIVES["tpot"])):
        (line,) = page.figures[f"{metric}-0"]["layout"]["shapes"]
        assert (line["x0"], line["x1"]) == (limit_ms, limit_ms)
