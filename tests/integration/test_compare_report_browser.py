"""The report of a comparison in a real browser without a network: it is drawn, fits, and runs nothing of others."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from made_comparison import FOUR, made_comparison
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

from loadtest.compare.html import render
from loadtest.compare.model import Comparison

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ATTACK = '<img src="http://127.0.0.1:9/x" onerror="window.stolen = 1"><script>window.stolen = 1</script>'
LINK = '<a href="http://127.0.0.1:9/">worker</a>'
Scheme = Literal["dark", "light"]

# What plotly drew of each figure, trace by trace, in the order of its data.
MARKS = """
() => JSON.parse(document.getElementById("figures").textContent).map(({id}) => {
  const element = document.getElementById(id), axes = element.getBoundingClientRect();
  return {
    id,
    problems: (Plotly.validate(element.data, element.layout) || []).filter(each => each.code !== "unused")
      .map(each => each.msg),
    wanted: element.data.length,
    bars: element.querySelectorAll(".bars .point path").length,
    points: element.querySelectorAll(".scatter .points path").length,
    lines: [...element.querySelectorAll("path.js-line")].filter(each => each.getAttribute("d").length > 10).length,
    width: axes.width, height: axes.height,
    colours: [...new Set([...element.querySelectorAll("text")].map(each => getComputedStyle(each).fill))],
  };
})
"""


@dataclass
class Opened:
    page: Page
    # Whatever the browser asked for besides the file, and what it complained about.
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def marks(self) -> dict[str, dict[str, Any]]:
        return {each["id"]: each for each in self.page.evaluate(MARKS)}

    def style(self, selector: str, name: str) -> str:
        read = "([selector, name]) => getComputedStyle(document.querySelector(selector))[name]"
        return str(self.page.evaluate(read, [selector, name]))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        why = "needs a browser: apt-get install chromium"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
    with sync_playwright() as playwright:
        # CI runs as root, where Chromium has no sandbox.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, comparison: Comparison, folder: Path, width: int, scheme: Scheme) -> Iterator[Opened]:
    """As a file, without a network."""
    path = folder / "report.html"
    path.write_text(render(comparison), encoding="utf-8")
    viewport = ViewportSize(width=width, height=900)
    with browser.new_context(viewport=viewport, color_scheme=scheme, offline=True) as context:
        opened = Opened(context.new_page())
        opened.page.on("request", lambda request: opened.requests.append(request.url))
        opened.page.on("console", lambda message: opened.complaints.append(f"{message.type}: {message.text}"))
        opened.page.on("pageerror", lambda error: opened.complaints.append(str(error)))
        opened.page.goto(path.as_uri())
        opened.page.wait_for_selector("html.drawn", timeout=60_000)
        opened.requests.remove(path.as_uri())
        yield opened


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_it_is_drawn_whole_and_fits(browser: Browser, tmp_path: Path, width: int, scheme: Scheme) -> None:
    with opened(browser, made_comparison(FOUR), tmp_path, width, scheme) as report:
        report.page.screenshot(path=tmp_path / f"report-{width}-{scheme}.png", full_page=True)
        marks = report.marks()
        assert len(marks) == 2 + 2 * 3 + 2 + len(FOUR)
        for figure in marks.values():
            assert figure["problems"] == [], figure["id"]
            assert figure["width"] > 250, figure["id"]
            assert figure["height"] > 150, figure["id"]
        assert (marks["draws"]["points"], marks["draws"]["lines"]) == (5 * len(FOUR), len(FOUR))
        assert marks["attainment"]["points"] == 7 * len(FOUR)
        assert marks["attainment"]["lines"] == 2 * len(FOUR)
        assert all(marks[name]["lines"] == len(FOUR) for name in ("ttft-0", "tpot-1", "itl-1"))
        timelines = [each for name, each in marks.items() if name.startswith("timeline-")]
        assert all(each["bars"] > 10 and each["points"] > 40 for each in timelines)
        assert all(each["lines"] and each["points"] for name, each in marks.items() if name.startswith("use-"))
        assert report.page.evaluate("document.documentElement.scrollWidth") <= width
        assert report.requests == []
        assert report.complaints == []


def test_it_follows_the_reader_from_light_to_dark(browser: Browser, tmp_path: Path) -> None:
    with opened(browser, made_comparison(count=30), tmp_path, 800, "light") as report:
        light, text = report.style("body", "backgroundColor"), report.marks()["attainment"]["colours"]
        report.page.emulate_media(color_scheme="dark")
        report.page.wait_for_function(f"() => !({MARKS})()[1].colours.includes({text[0]!r})", timeout=30_000)
        assert report.style("body", "backgroundColor") != light
        assert set(report.marks()["attainment"]["colours"]).isdisjoint(text)


def test_names_of_users_run_nothing_and_lead_nowhere(browser: Browser, tmp_path: Path) -> None:
    made = made_comparison(count=30)
    measured = [
        each.model_copy(
            update={
                "shown": [
                    run.model_copy(update={"use": [use.model_copy(update={"worker": LINK}) for use in run.use]})
                    for run in each.shown
                ]
            }
        )
        for each in made.measured
    ]
    spoiled = made.model_copy(update={"model": ATTACK, "command": ATTACK, "measured": measured})
    with opened(browser, spoiled, tmp_path, 800, "light") as report:
        assert report.page.locator("dd", has_text="onerror").count() == 2
        assert report.page.locator("svg .annotation text", has_text=LINK).count() > 0
        assert report.page.locator("a").count() == 0
        assert report.page.evaluate("window.stolen") is None
        assert report.requests == []
        assert report.complaints == []


def test_its_policy_stops_what_is_not_its_own(browser: Browser, tmp_path: Path) -> None:
    """Even if something got through: the page itself may neither run nor load it."""
    with opened(browser, made_comparison(count=30), tmp_path, 800, "light") as report:
        report.page.evaluate(
            "attack => { document.body.append(document.createRange().createContextualFragment(attack)) }", ATTACK
        )
        report.page.wait_for_function("() => [...document.images].every(image => image.complete)", timeout=10_000)
        assert report.page.evaluate("window.stolen") is None
        assert any("Content Security Policy" in each for each in report.complaints)
