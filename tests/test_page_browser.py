"""The page of reports in a browser: what it looks like, that it is usable by everybody, and that nothing in it runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from page_examples import HOLDING_ALL, HOSTILE, hostile, ordinary, wide
from playwright.sync_api import Browser, Page, sync_playwright

from memdiag import page as pages
from memdiag import page_svg

pytestmark = pytest.mark.xdist_group("browser")  # one browser for all

ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
SCREENS: dict[str, dict[str, Any]] = {
    "light": {"viewport": {"width": 1200, "height": 900}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1200, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light", "device_scale_factor": 2},
    "dark phone": {"viewport": {"width": 320, "height": 640}, "color_scheme": "dark"},
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        missing = "no chromium on the PATH (Debian: apt-get install chromium)"
        if os.environ.get("CI") or os.environ.get("MEMDIAG_TEST_BROWSER") == "required":
            pytest.fail(missing)
        pytest.skip(missing)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    made = pages.html([ordinary(), hostile(), ordinary("other.parquet")], title=HOLDING_ALL, notes=HOSTILE)
    path.write_text(made, encoding="utf-8")
    return path


class Events(list[str]):
    """What a page did that it should not: requests, dialogs, errors, words on the console."""

    def listen(self, page: Page, allowed: str = "") -> None:
        page.on("request", lambda request: request.url != allowed and self.append(f"request {request.url[:80]}"))
        page.on("console", lambda message: self.append(f"console {message.text}"))
        page.on("pageerror", lambda error: self.append(f"error {error}"))
        page.on("popup", lambda popup: self.append(f"popup {popup.url}"))
        page.on("dialog", self._dismiss)

    def _dismiss(self, dialog: Any) -> None:
        self.append(f"dialog {dialog.message}")
        dialog.dismiss()


Open = Callable[..., tuple[Page, Events]]


@pytest.fixture
def opened(browser: Browser, file: Path) -> Iterator[Open]:
    """Open the page on a screen of SCREENS."""
    contexts = []

    def open_(screen: str, **options: Any) -> tuple[Page, Events]:
        contexts.append(browser.new_context(**SCREENS[screen], **options))
        page, events = contexts[-1].new_page(), Events()
        events.listen(page, file.as_uri())
        page.goto(file.as_uri())
        return page, events

    yield open_
    for context in contexts:
        context.close()


def overflow(page: Page) -> int:
    """Pixels by which the page is wider than its window."""
    found: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return found


@pytest.mark.parametrize("screen", SCREENS)
def test_it_fits_loads_nothing_and_runs_nothing(screen: str, opened: Open) -> None:
    page, events = opened(screen)
    page.wait_for_timeout(100)  # for what would come late
    assert events == []
    assert overflow(page) <= 0
    assert page.locator("section").count() == 3
    assert page.locator("script, img, iframe, object, embed, foreignObject, main *[onerror], main style").count() == 0


def test_what_a_page_must_not_do_would_be_seen(browser: Browser) -> None:
    context = browser.new_context()
    page, events = context.new_page(), Events()
    events.listen(page, "about:blank")
    page.set_content(
        "<script>alert(1); throw new Error('x')</script><img src='file:///none.png'><div style='width: 9999px'>x</div>"
    )
    page.wait_for_timeout(100)
    assert {event.split()[0] for event in events} == {"dialog", "error", "request", "console"}
    assert overflow(page) > 0
    context.close()


def test_the_policy_stops_a_script_that_got_in(browser: Browser, file: Path, tmp_path: Path) -> None:
    bad = "<script>document.title = 'ran'</script><img src=x onerror=\"document.title='ran'\"></main>"
    path = tmp_path / "bad.html"
    path.write_text(file.read_text(encoding="utf-8").replace("</main>", bad), encoding="utf-8")
    context = browser.new_context()
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.locator("main script").count() == 1
    assert page.title() != "ran"
    context.close()


@pytest.mark.parametrize("screen", ["light", "dark", "phone"])
def test_axe_finds_no_violation(screen: str, opened: Open) -> None:
    page, _ = opened(screen, bypass_csp=True)  # axe is a script
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    passed = {rule["id"] for rule in found.response["passes"]}
    assert {"color-contrast", "document-title", "heading-order", "html-has-lang", "svg-img-alt", "region"} <= passed


def test_axe_finds_a_page_that_is_worse(browser: Browser, file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    for right, wrong in (
        (' lang="en"', ""),
        ("--muted: #57606a", "--muted: #aab2ba"),
        ("<h2", "<h4"),
        ("</h2", "</h4"),
    ):
        assert right in source
        source = source.replace(right, wrong)
    context = browser.new_context(**SCREENS["light"], bypass_csp=True)
    page = context.new_page()
    page.set_content(source)
    found = {rule["id"] for rule in Axe().run(page).response["violations"]}
    assert {"html-has-lang", "color-contrast", "heading-order"} <= found
    context.close()


def colours(page: Page) -> dict[str, str]:
    """Computed colours, as the browser paints them."""
    found: dict[str, str] = page.evaluate(
        """() => {
            const of = (selector, name) => getComputedStyle(document.querySelector(selector))[name];
            const text = [...document.querySelectorAll('svg text')].find(e => e.textContent == 'step');
            return {page: of('html', 'backgroundColor'), ink: of('html', 'color'), label: getComputedStyle(text).fill,
                    line: of('svg [style*="stroke: var(--series-1); stroke-width"]', 'stroke')};
        }"""
    )
    return found


def test_the_figures_turn_with_the_scheme(opened: Open) -> None:
    light, dark = colours(opened("light")[0]), colours(opened("dark")[0])
    assert (light["page"], dark["page"]) == ("rgb(255, 255, 255)", "rgb(15, 19, 24)")
    assert light["label"] == light["ink"] == "rgb(27, 31, 36)"
    assert dark["label"] == dark["ink"] == "rgb(230, 234, 238)"
    assert (light["line"], dark["line"]) == ("rgb(31, 95, 168)", "rgb(111, 177, 255)")


def test_the_printed_page_is_light_and_shows_everything(opened: Open) -> None:
    page, _ = opened("dark")
    assert not page.locator(".provenance dd").first.is_visible()
    page.emulate_media(media="print", color_scheme="dark")
    assert colours(page)["page"] == "rgb(255, 255, 255)"
    assert colours(page)["label"] == "rgb(27, 31, 36)"
    assert page.locator(".provenance dd").first.bounding_box()["height"] > 5  # type: ignore[index]
    assert not page.locator("nav").is_visible()
    page.set_viewport_size({"width": 680, "height": 900})  # A4 less its margins
    assert overflow(page) <= 0
    boxes = page.evaluate("[...document.querySelectorAll('.scroll')].map(e => [e.scrollHeight, e.clientHeight])")
    assert boxes
    assert all(scroll <= client for scroll, client in boxes)  # nothing is cut off
    made = page.pdf(format="A4")
    assert made.startswith(b"%PDF")
    assert made.count(b"/Type /Page\n") >= 3


def test_a_plot_fits_a_phone_and_has_its_natural_width_on_a_desk(opened: Open) -> None:
    wide, narrow = (opened(screen)[0].locator("figure svg").first.bounding_box() for screen in ("light", "phone"))
    assert wide is not None
    assert narrow is not None
    assert wide["width"] == pytest.approx(page_svg.HALF * 96 * 1.1, abs=1)
    assert narrow["width"] == pytest.approx(390 - 32, abs=1)
    assert wide["width"] / wide["height"] == pytest.approx(narrow["width"] / narrow["height"], rel=0.01)


@pytest.fixture
def of_wide(browser: Browser, tmp_path: Path) -> Iterator[Callable[[int], Page]]:
    """A page of what is wide, in a window of some pixels."""
    path = tmp_path / "wide.html"
    path.write_text(pages.html([wide()], title="wide"), encoding="utf-8")
    context = browser.new_context()

    def open_(width: int) -> Page:
        page = context.new_page()
        page.set_viewport_size({"width": width, "height": 900})
        page.goto(path.as_uri())
        return page

    yield open_
    context.close()


@pytest.mark.parametrize("width", [320, 390, 700, 850, 1000, 1300, 2000])
def test_what_is_wide_uses_the_room_there_is_and_no_more(width: int, of_wide: Callable[[int], Page]) -> None:
    page = of_wide(width)
    assert overflow(page) <= 0
    plain, dense = (page.locator("figure .scroll").nth(i) for i in range(2))
    assert plain.evaluate("e => e.scrollWidth <= e.clientWidth")  # its axis is seen as a whole
    assert dense.evaluate("e => e.scrollWidth > e.clientWidth") == (width < 560)
    assert dense.locator("svg").bounding_box()["width"] >= 560  # type: ignore[index]
    boxes = [page.locator(".table").nth(i).bounding_box() for i in range(3)]
    for box in boxes:
        assert box is not None
        assert box["x"] >= 0
        assert abs(box["x"] + box["width"] / 2 - width / 2) <= 1  # in the middle
    room = min(1100, width - 64) if width >= 848 else width - (32 if width <= 640 else 48)
    assert boxes[0]["width"] == pytest.approx(room, abs=1)  # type: ignore[index]
    assert page.locator(".table").nth(0).evaluate("e => e.scrollWidth > e.clientWidth")


def test_on_paper_no_number_is_broken_and_what_does_not_fit_is_told(of_wide: Callable[[int], Page]) -> None:
    page = of_wide(680)  # A4 less its margins
    assert not page.locator(".paper").first.is_visible()
    page.emulate_media(media="print")
    assert overflow(page) <= 0
    sizes = page.evaluate(
        "[...document.querySelectorAll('.table')].map(e => [e.scrollWidth, e.clientWidth])",
    )
    assert all(scroll <= client for scroll, client in sizes)
    broken = page.evaluate(
        """() => [...document.querySelectorAll('td.number, tbody th:not(.long)')].filter(e => {
            const range = document.createRange();
            range.selectNodeContents(e);
            return new Set([...range.getClientRects()].map(r => r.top)).size > (e.matches('th') ? 4 : 1);
        }).length"""
    )
    assert broken == 0
    shown = page.locator(".table").nth(0).locator("thead th:visible").count()
    assert 5 < shown < 21
    assert f"the first {shown} of 21 columns" in page.locator(".paper").first.inner_text()
    assert page.locator(".paper").count() == 1
    assert page.locator(".table").nth(1).locator("thead th:visible").count() == 8


def test_headings_go_from_the_page_to_its_reports_to_their_parts(opened: Open) -> None:
    page, _ = opened("light")
    found = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].map(e => e.tagName)")
    assert found[:3] == ["H1", "H2", "H2"]
    assert found.count("H1") == 1
    assert found.count("H2") == 1 + page.locator("section").count()
    assert set(found[1:]) == {"H2", "H3"}


def test_a_wide_table_scrolls_in_its_box(opened: Open) -> None:
    page, _ = opened("phone")
    box = page.locator(".table").nth(1)
    assert box.evaluate("e => e.scrollWidth > e.clientWidth")
    box.focus()
    page.keyboard.press("ArrowRight")
    for _ in range(40):  # it scrolls smoothly
        page.wait_for_timeout(25)
        if box.evaluate("e => e.scrollLeft") > 0:
            break
    assert box.evaluate("e => e.scrollLeft") > 0
    assert page.evaluate("document.scrollingElement.scrollLeft") == 0


def test_the_keyboard_reaches_the_reports_first(opened: Open) -> None:
    page, _ = opened("light")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["y"] >= 0  # type: ignore[index]
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "reports"


def test_right_to_left_text_turns_nothing_round(opened: Open) -> None:
    page, _ = opened("light")
    row = page.locator("tbody tr", has_text="שלום עולם (12)").last
    text, number = row.locator("th").bounding_box(), row.locator("td").bounding_box()
    assert text is not None
    assert number is not None
    assert text["x"] < number["x"]
    caption = page.locator("figcaption", has_text="שלום").first
    assert caption.locator("b").bounding_box()["x"] <= caption.bounding_box()["x"] + 1  # type: ignore[index]


def test_hostile_text_is_read_as_it_was_written(opened: Open) -> None:
    page, _ = opened("light")
    shown = page.locator("#report-2 .notes li").all_inner_texts()
    assert shown[: len(HOSTILE) - 1] == [pages.plain(text, pages.LINE) for text in HOSTILE[:-1]]
    assert page.title() == pages.plain(HOLDING_ALL, pages.LABEL)
