"""The page in a browser: nothing overflows, all text can be read, nothing hostile runs, and axe-core finds no fault."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from pages.browser import browser, opened, photograph

from ckptavg.report.page import page

VIEWS = [(400, "light"), (800, "light"), (1400, "dark"), (400, "dark"), (800, "dark"), (1400, "light")]
KINDS = [
    "sewa", "aswa", "twa", "twa on training data", "quadratic twa", "quadratic sewa", "layer-wise twa", "swag",
    "comparison", "comparison without test data", "without test data", "blend", "one candidate", "nothing scored",
    "dry run", "landscape", "inspection", "evaluation",
]  # fmt: skip
OVERFLOW = """() => [...document.querySelectorAll("body *")]
    .filter(e => !e.closest(".scroll, pre, svg, .skip") && e.getBoundingClientRect().right > innerWidth + 1)
    .map(e => e.outerHTML.slice(0, 80)).concat(
        document.documentElement.scrollWidth > innerWidth ? ["the page is wider than the window"] : [])"""
# of every SVG that is shown: texts that leave it, are too small to read or cover each other
TEXTS = """() => [...document.querySelectorAll("svg.plot")]
    .filter(svg => svg.getBoundingClientRect().width).flatMap(svg => {
    const frame = svg.getBoundingClientRect(), faults = [];
    const scale = frame.width / svg.viewBox.baseVal.width;
    const boxes = [...svg.querySelectorAll("text")].filter(t => t.textContent.trim()).map(t => {
        const box = t.getBoundingClientRect();
        const size = parseFloat(getComputedStyle(t).fontSize) * scale;
        if (size < 9) faults.push(`${size} px: ${t.textContent}`);
        if (box.left < frame.left - 1 || box.right > frame.right + 1
            || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
            faults.push(`outside: ${t.textContent}`);
        return [box, t.textContent];
    });
    boxes.forEach(([a, one], i) => boxes.slice(i + 1).forEach(([b, other]) => {
        const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (wide > 1 && high > 0.35 * Math.min(a.height, b.height)) faults.push(`${one} covers ${other}`);
    }));
    return faults.map(fault => `${svg.querySelector("title").textContent}: ${fault}`);
})"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def files(reports: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    made = {name: [report] for name, report in reports.items()}
    made["several"] = [reports[name] for name in ("sewa", "quadratic sewa", "comparison")]
    for name, shown in made.items():
        (folder / f"{name.replace(' ', '-')}.html").write_text(page(shown), encoding="utf-8")
    return {name: folder / f"{name.replace(' ', '-')}.html" for name in made}


def test_every_kind_of_report_is_looked_at(reports: Mapping[str, Any]):
    assert [*reports] == KINDS


@pytest.mark.parametrize("name", [*KINDS, "several"])
def test_a_page_fits_every_screen_can_be_read_and_has_no_barrier(
    chromium: Any, files: Mapping[str, Path], name: str, tmp_path: Path
):
    for width, scheme in VIEWS if name == "comparison" else VIEWS[:3]:
        with opened(chromium, files[name], width, scheme) as tab:
            photograph(tab, tmp_path, f"{files[name].stem}-{width}-{scheme}")
            tab.evaluate("() => document.querySelectorAll('details').forEach(d => d.open = true)")
            assert tab.evaluate(OVERFLOW) == []
            assert tab.evaluate(TEXTS) == []
            if width != 800:
                found = Axe().run(tab, options={"resultTypes": ["violations"]}).response["violations"]
                assert [(fault["id"], [node["html"][:200] for node in fault["nodes"]]) for fault in found] == []


def test_hostile_names_run_nothing_and_are_shown_as_text(chromium: Any, reports: Mapping[str, Any], tmp_path: Path):
    names = ["<script>document.title = 'run'</script>", "<img src=x onerror=\"document.title='run'\">", "שלום-1.pt"]
    report = copy.deepcopy(reports["sewa"])
    for candidate, name in zip(report["candidates"], names, strict=False):
        candidate["path"] = name
    report["warnings"] = [*names, "evil\u202egnp.pt"]
    (tmp_path / "x.html").write_text(page([report]), encoding="utf-8")
    with opened(chromium, tmp_path / "x.html", 400, "light") as tab:
        lines = tab.eval_on_selector_all("p.line", "all => all.map(e => e.textContent)")
        assert lines == [*names, "evil\\u202egnp.pt"]
        assert tab.title().startswith("ckptavg: sewa") and tab.query_selector("img") is None
        cells = tab.eval_on_selector_all("td", "all => all.map(e => e.textContent)")
        assert {*names} <= {*cells}


def test_the_page_is_used_with_the_keyboard(chromium: Any, files: Mapping[str, Path]):
    with opened(chromium, files["comparison"], 800, "light") as tab:
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.textContent") == "Skip to the report"
        tab.keyboard.press("Enter")
        assert tab.evaluate("document.activeElement.id") == "main"
        assert tab.eval_on_selector_all("h1", "all => all.length") == 1
        tab.click(".command button")
        tab.wait_for_selector("text=/Copied|Selected: press/")
        assert tab.inner_text(".command button") in ("Copied", "Selected: press Ctrl-C")


def test_the_page_is_printed_light_with_wide_plots_and_without_buttons(chromium: Any, files: Mapping[str, Path]):
    with opened(chromium, files["comparison"], 700, "dark") as tab:
        assert tab.is_visible("svg.narrow") and tab.is_visible("button")
        tab.emulate_media(media="print", color_scheme="dark")
        assert tab.is_visible("svg.wide") and not tab.is_visible("svg.narrow")
        assert not tab.is_visible("button") and not tab.is_visible("nav")
        assert tab.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"


def test_a_page_of_300_candidates_can_be_read(chromium: Any, reports: Mapping[str, Any], tmp_path: Path):
    report = copy.deepcopy(reports["sewa"])
    n = len(report["candidates"])
    report["candidates"] = [{**report["candidates"][i % n], "step": 12_500 * (i + 1)} for i in range(300)]
    report["trace"]["s"] = [[row[i % n] for i in range(300)] for row in report["trace"]["s"]]
    (tmp_path / "x.html").write_text(page([report]), encoding="utf-8")
    for width in (400, 1400):
        with opened(chromium, tmp_path / "x.html", width, "light") as tab:
            photograph(tab, tmp_path, f"many-{width}")
            assert tab.evaluate(OVERFLOW) == [] and tab.evaluate(TEXTS) == []
