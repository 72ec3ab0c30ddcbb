"""The page in a real browser without a network: every plot draws, at every width, in light and in dark."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import headless_browser
import pytest

from llmt_prep.html import write_page
from llmt_prep.stats import dataset_stats
from llmt_shared.dataset import open_dataset

# Marks that have an area and lie inside the box of their plot, and the colours they are filled with.
MARKS = """[...document.querySelectorAll('.plot')].map((plot) => {
  const box = plot.getBoundingClientRect();
  const marks = [...plot.querySelectorAll('.points path')].filter((mark) => {
    const at = mark.getBoundingClientRect();
    return at.width * at.height > 1 && at.left >= box.left && at.right <= box.right && at.top >= box.top
      && at.bottom <= box.bottom;
  });
  return {
    marks: marks.length,
    colours: [...new Set(marks.map((mark) => getComputedStyle(mark).fill))],
    titles: [...plot.querySelectorAll('.xtitle, .ytitle')].map((title) => title.textContent),
    cut: [...plot.querySelectorAll('text')].filter((text) => {
      const at = text.getBoundingClientRect();
      return at.width && (at.left < box.left || at.right > box.right || at.bottom > box.bottom);
    }).map((text) => text.textContent),
  };
})"""
TITLES = [
    ["share of the tokens, %"],
    ["tokens of a segment"],
    ["tokens in a row", "share of the rows, %"],
    ["targets in a row", "share of the rows, %"],
]


@pytest.fixture(scope="module")
def report(hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dataset, target = open_dataset(hostile), tmp_path_factory.mktemp("report") / "report.html"
    write_page(dataset, dataset_stats(dataset), target)
    return target


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[headless_browser.Page]:
    with headless_browser.browsing(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module", params=[(1400, False), (1400, True), (380, False), (380, True)], ids=str)
def shown(request, browser, report) -> headless_browser.Page:
    browser.open(report, *request.param)
    return browser


def test_every_plot_draws_marks_titles_and_no_text_outside_its_box(shown):
    plots: list[dict[str, Any]] = shown.run(MARKS)
    assert [plot["titles"] for plot in plots] == TITLES
    for plot in plots:
        assert plot["marks"] >= 2
        assert plot["cut"] == []


def test_nothing_is_wider_than_the_screen(shown):
    assert shown.run("document.documentElement.scrollWidth <= innerWidth")


def test_nothing_is_asked_for_but_the_page_and_nothing_is_complained_of(shown, report):
    assert shown.requests() == [report.resolve().as_uri()]
    assert shown.complaints() == []


def test_no_script_of_the_data_has_run(shown):
    assert shown.run("window.broken") is None


def test_a_request_would_have_been_refused(browser, report):
    """So that the test of requests can fail."""
    browser.open(report, 1400, False)
    browser.run("fetch('https://example.org/').catch(() => 0)")
    assert "Content Security Policy" in " ".join(browser.complaints())


def test_plots_follow_when_light_turns_to_dark(browser, report):
    browser.open(report, 1400, False)
    light = [set(plot["colours"]) for plot in browser.run(MARKS)]
    browser.prefer("dark")
    browser.settle()
    dark = [set(plot["colours"]) for plot in browser.run(MARKS)]
    assert all(light)
    assert all(dark)
    assert set.union(*light).isdisjoint(set.union(*dark))


def test_plots_follow_the_width_of_the_window(browser, report):
    browser.open(report, 1400, False)
    browser.call("Emulation.setDeviceMetricsOverride", width=380, height=900, deviceScaleFactor=1, mobile=False)
    end = time.monotonic() + 20
    while not (follows := fits_the_window(browser)) and time.monotonic() < end:
        browser.settle()
    assert follows


def fits_the_window(browser):
    fits = browser.run("document.documentElement.scrollWidth <= innerWidth")
    return fits and all(plot["marks"] >= 2 for plot in browser.run(MARKS))


def test_a_picture_of_each_plot_has_many_colours(shown):
    """Pixels and not the document: what is drawn can be seen."""
    image = pytest.importorskip("PIL.Image")
    import io

    picture = image.open(io.BytesIO(shown.picture())).convert("RGB")
    boxes = shown.run(
        "[...document.querySelectorAll('.plot')].map((plot) => { const at = plot.getBoundingClientRect();"
        " return [at.left + 4, at.top + scrollY + 4, at.right - 4, at.bottom + scrollY - 4].map(Math.round); })"
    )
    for box in boxes:
        counts = sorted(picture.crop(box).getcolors(1 << 20), reverse=True)
        drawn = sum(count for count, _ in counts[1:])  # the commonest colour is the card's
        assert drawn > 0.01 * sum(count for count, _ in counts)


def test_a_missing_browser_is_a_failure_where_one_is_required(monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.setenv("LLMT_REQUIRE_BROWSER", "1")
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"):
        headless_browser.chromium()
    monkeypatch.delenv("LLMT_REQUIRE_BROWSER")
    with pytest.raises(pytest.skip.Exception, match="no browser found"):
        headless_browser.chromium()
