"""The pages that users see, in a real browser: a comparison's report, and the site of the documentation."""

import http.server
import re
import shutil
import threading
from functools import partial

import numpy as np
import pytest
from comparison_helpers import recorded, write_finished_run, write_grid
from helpers import ROOT
from mkdocs.commands.build import build
from mkdocs.config import load_config
from playwright.sync_api import expect, sync_playwright

from onpolicy_skd import compare
from onpolicy_skd.comparison import grid

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDE, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
LEAST_CONTRAST = 4.5  # of text, WCAG 2.1, level AA
# Yields each visible text with its contrast against the backgrounds below it, the lowest first.
CONTRASTS = """() => {
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  const over = (top, under) => under.map((u, i) => (top[3] ?? 1) * top[i] + (1 - (top[3] ?? 1)) * u);
  const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = rgb => 0.2126 * linear(rgb[0]) + 0.7152 * linear(rgb[1]) + 0.0722 * linear(rgb[2]);
  const background = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.unshift(numbers(getComputedStyle(e).backgroundColor));
    return layers.reduce((under, top) => over(top, under), [255, 255, 255]);
  };
  const ratios = [];
  for (const element of document.body.querySelectorAll("*")) {
    const text = [...element.childNodes].filter(n => n.nodeType === 3 && n.data.trim()).map(n => n.data).join(" ");
    if (!text || !element.checkVisibility() || element.closest("style, script")) continue;
    const style = getComputedStyle(element), behind = background(element);
    const color = over(numbers(element.closest("svg") ? style.fill : style.color), behind);
    const [low, high] = [luminance(color), luminance(behind)].sort((a, b) => a - b);
    ratios.push([(high + 0.05) / (low + 0.05), text.trim().slice(0, 60)]);
  }
  return ratios.sort((a, b) => a[0] - b[0]);
}"""
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # CI is root
        yield browser
        browser.close()


class Visitor:
    """A tab that keeps what a page must not do: errors on the console, and requests outside of ``home``."""

    def __init__(self, browser, home, viewport, scheme="light", touch=False):
        self.context = browser.new_context(viewport=viewport, color_scheme=scheme, has_touch=touch)
        self.page = self.context.new_page()
        self.errors, self.requests = [], []
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda r: None if r.url.startswith((home, "data:")) else self.requests.append(r.url))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()

    def check(self):
        """Nothing went wrong, nothing was fetched, and nothing is wider than the screen."""
        width = self.page.evaluate("document.documentElement.scrollWidth")
        assert (self.errors, self.requests) == ([], [])
        assert width <= self.page.viewport_size["width"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    comparison, rng = grid.load(write_grid(folder)), np.random.default_rng(0)
    for run in comparison.trained:
        write_finished_run(run, rng.random(50) < 0.5)
        recorded(run)
    return compare.write_report(comparison, folder / "out").as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
@pytest.mark.parametrize("source", ["written", "of the demo"])
def test_the_report_is_readable_and_fetches_nothing(browser, report, source, viewport, scheme):
    report = report if source == "written" else (ROOT / "docs" / "comparison" / "report.html").as_uri()
    with Visitor(browser, report, viewport, scheme) as visitor:
        visitor.page.goto(report)
        visitor.check()
        background = visitor.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background))) < 384) == (scheme == "dark")
        contrasts = visitor.page.evaluate(CONTRASTS)
        assert len(contrasts) > 50
        assert [c for c in contrasts if c[0] < LEAST_CONTRAST] == []


def shown_numbers(token):
    """The text that the page shows at the bottom of the screen for a token; None for none."""
    content, position = token.evaluate(
        "e => [getComputedStyle(e, '::after').content, getComputedStyle(e, '::after').position]"
    )
    return content.strip('"') if position == "fixed" else None


@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
def test_a_token_shows_its_numbers_when_it_is_clicked_or_reached_by_keyboard(browser, report, viewport):
    phone = viewport is PHONE
    with Visitor(browser, report, viewport, touch=phone) as visitor:
        visitor.page.goto(report)
        tokens = visitor.page.locator("details[open] .t")
        first, second = tokens.nth(0), tokens.nth(1)
        assert shown_numbers(first) is None
        (first.tap if phone else first.click)()
        assert shown_numbers(first) == "entropy 0.000 nats, divergence 0.100 nats, not selected"
        visitor.page.keyboard.press("Tab")
        assert shown_numbers(second) == "entropy 1.000 nats, divergence 0.200 nats, selected"
        assert shown_numbers(first) is None
        closed = visitor.page.locator("details:not([open])").first
        assert not closed.locator(".t").first.is_visible()
        closed_summary = visitor.page.locator("details:not([open]) > summary").first
        count = visitor.page.locator("details[open]").count()
        (closed_summary.tap if phone else closed_summary.click)()
        assert visitor.page.locator("details[open]").count() == count + 1
        visitor.check()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of the documentation, built and served on loopback."""
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), site_url="", strict=True))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", folder
    server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
def test_every_page_of_the_site_fits_and_fetches_nothing_from_elsewhere(browser, site, viewport):
    address, folder = site
    pages = sorted(f.parent.relative_to(folder).as_posix() for f in folder.rglob("index.html"))
    assert len(pages) > 15
    with Visitor(browser, address, viewport) as visitor:
        for name in pages:
            visitor.page.goto(f"{address}{name}/")
            visitor.check()


@pytest.mark.slow
def test_the_site_finds_a_setting(browser, site):
    with Visitor(browser, site[0], WIDE) as visitor:
        visitor.page.goto(site[0])
        visitor.page.locator("[data-md-component=search-query]").click()
        visitor.page.keyboard.type("feature_entropy")
        visitor.page.locator(".md-search-result__link[href*='settings/']").first.click()
        expect(visitor.page.locator("code", has_text="alignment.feature_entropy").first).to_be_visible()  # waits for it
        visitor.check()
