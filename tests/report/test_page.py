"""The page in a browser: nothing overflows, all text can be read, nothing hostile runs, and axe-core finds no fault."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from pages.browser import browser, opened

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
TEXTS = """() => [...document.querySelectorAll("svg.plot")].filter(svg => svg.getBoundingClientRect().width).flatMap(svg => {
    const frame = svg.getBoundingClientRect(), faults = [];
    const scale = frame.width / svg.viewBox.baseVal.width;
    const boxes = [...svg.querySelectorAll("text")].filter(t => t.textContent.trim()).map(t => {
        const box = t.getBoundingClientRect();
        const size = parseFloat(getComputedStyle(t).fontSize) * scale;
        if (size < 9) faults.push(`${size} px: ${t.textContent}`);
        if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
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
            tab.screenshot(path=tmp_path / f"{files[name].stem}-{width}-{scheme}.png", full_page=True)
            tab.evaluate("() => document.querySelectorAll('details').forEach(d => d.open = true)")
            assert tab.evaluate(OVERFLOW) == []
            assert tab.evaluate(TEXTS) == []
            if width != 800:
                found = Axe().run(tab, options={"resultTypes": ["violations"]}).response["violations"]
                assert [(fault["id"], [node["html"][:200] for node in fault["nodes"]]) for fault in found] == []
