"""The page of reports and its summary: what a browser and GitHub will make of it, without either."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from markdown_it import MarkdownIt
from page_examples import HOLDING_ALL, HOSTILE, hostile, ordinary, plot

from memdiag import page, page_svg, tables
from memdiag.errors import InputError
from memdiag.page import Figure, Plot, Section, Table
from memdiag.page_report import _search, build, report
from memdiag.page_text import JOINERS, as_code, as_shell, cut, drawable, in_markdown, plain, shown

VOID = {"meta", "link", "br", "img", "hr", "input"}
TITLE = "Memorization of my-model"


class Parsed(HTMLParser):
    """Elements, attributes and text of a page whose every element is closed where it should be."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []  # innermost element, text
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open  # only there is <a/> the end of an element
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def text(self) -> str:
        return "".join(data for tag, data in self.texts if tag != "style")

    @property
    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]

    def all(self, *tags: str) -> list[tuple[str, dict[str, str]]]:
        return [element for element in self.elements if element[0] in tags]


@pytest.fixture(scope="module")
def source() -> str:
    return page.html([ordinary(), hostile(), ordinary("other.parquet")], title=HOLDING_ALL, notes=HOSTILE)


@pytest.fixture(scope="module")
def parsed(source: str) -> Parsed:
    return Parsed(source)


def test_every_element_is_closed_where_it_should_be(source: str) -> None:
    assert source.startswith("<!DOCTYPE html>\n<html lang=\"en\">")  # fmt: skip
    assert len(Parsed(source).elements) > 500
    with pytest.raises(AssertionError):
        Parsed(source.replace("</figure>", "", 1))


def test_no_script_no_handler_no_address(parsed: Parsed) -> None:
    assert not parsed.all("script", "iframe", "object", "embed", "form", "base", "img", "foreignobject", "video", "b0")
    for tag, attributes in parsed.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src", "xlink:href", "action", "srcset", "data", "poster"):
                assert value.startswith("#") or value == "data:," or (tag, value[:15]) == ("image", "data:image/png;")
            if name != "aria-label":
                assert "://" not in value
    styles = [data for tag, data in parsed.texts if tag == "style"]
    assert len(styles) == 1
    assert "url(" not in styles[0]
    assert "@import" not in styles[0]


def test_the_policy_forbids_all_but_its_style_and_its_pictures(parsed: Parsed) -> None:
    policy = [a["content"] for _, a in parsed.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == [
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    ]


@pytest.mark.parametrize("text", HOSTILE[:-1])
def test_untrusted_text_is_shown_as_it_is(text: str, parsed: Parsed) -> None:
    assert plain(text, 300) in parsed.text


def test_no_character_of_a_page_hides_or_reorders(source: str) -> None:
    hidden = {
        letter for letter in set(source) if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    } - {"\n", *JOINERS}  # fmt: skip
    assert hidden == set()
    source.encode()  # no half of a pair


def test_a_text_of_another_direction_is_isolated(parsed: Parsed) -> None:
    assert all(tag in ("bdi", "span", "title", "desc", "text", "tspan") for tag, data in parsed.texts if "שלום" in data)
    assert sum("שלום" in data for tag, data in parsed.texts if tag == "bdi") > 5


def test_headings_are_in_order_and_sections_are_named_by_them(parsed: Parsed) -> None:
    levels = [int(tag[1]) for tag, _ in parsed.all("h1", "h2", "h3", "h4", "h5", "h6")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    sections = parsed.all("section")
    assert len(sections) == 3
    named = {attributes.get("id") for tag, attributes in parsed.all("h2")}
    assert all(attributes["aria-labelledby"] in named for _, attributes in sections)


def test_ids_are_unique_and_every_reference_has_its_target() -> None:
    same = ordinary()  # three times the same drawing: its ids must not meet
    found = Parsed(page.html([same, same, same], title=TITLE))
    assert len(found.ids) == len(set(found.ids))
    targets = set()
    for _, attributes in found.elements:
        targets |= {attributes["href"][1:]} if attributes.get("href", "").startswith("#") else set()
        targets |= set(attributes.get("aria-labelledby", "").split())
        for value in attributes.values():
            targets |= set(re.findall(r"url\(#([^)]+)\)", value))
    assert len(targets) == 3 * (1 + 1 + 2 + 5) + 2  # section, its heading, title and desc, parts; overview, main
    assert targets <= set(found.ids)


def test_plots_have_a_name_a_description_and_a_caption(parsed: Parsed) -> None:
    drawings = parsed.all("svg")
    assert len(drawings) == len(parsed.all("figure")) == len(parsed.all("figcaption")) == 7
    texts = dict(zip(("1", "2", "3"), (data for tag, data in parsed.texts if tag == "desc")))
    for _, attributes in drawings:
        assert attributes["role"] == "img"
        assert set(attributes["aria-labelledby"].split()) <= set(parsed.ids)
    assert texts["1"] == "The loss falls from 1 to 0.05."


def test_tables_say_what_their_cells_are_of(parsed: Parsed) -> None:
    assert len(parsed.all("table")) == len(parsed.all("caption")) == 4
    assert all(attributes["scope"] in ("col", "row") for _, attributes in parsed.all("th"))
    boxes = [a for tag, a in parsed.all("div") if "scroll" in a.get("class", "").split()]
    assert len(boxes) == 4 + 7  # tables and plots
    assert all(a["tabindex"] == "0" and a["role"] == "region" for a in boxes)
    labels = [a["aria-label"] for a in boxes]
    assert len(set(labels)) == len(labels)


def test_the_overview_tells_the_first_figure_of_every_report(source: str) -> None:
    nav = source[source.index("<nav") : source.index("</nav>") + 6]
    assert Parsed(nav).text.count("MBE, mean over layers 0.412 (0.396 to 0.428)") == 2
    assert [a["href"] for _, a in Parsed(nav).all("a")] == ["#report-1", "#report-2", "#report-3"]


def test_a_report_without_anything_has_a_section() -> None:
    found = Parsed(page.html([Section("check", "check.parquet", "Do the rules hold?")], title=TITLE))
    assert "Do the rules hold?" in found.text
    assert not found.all("figure", "table", "details", "dl")
    assert "1 report." in found.text


def test_a_page_of_no_reports_says_so() -> None:
    assert "No reports." in Parsed(page.html([], title=TITLE)).text
    assert "No reports." in page.markdown([], title=TITLE)


def test_ragged_rows_and_empty_cells_stay_in_their_columns() -> None:
    table = Table("t", ("a", "", "c"), (("1",), ("2", "3", "4", "5"), ("", "x", "")), (True, False, False))
    found = Parsed(page.html([Section("score", "s", "q", tables=(table,))], title=TITLE))
    cells = [tag for tag, _ in found.all("th", "td")]
    assert len(cells) == 4 * 3
    assert "5" not in [data for tag, data in found.texts if tag == "td"]
    assert [a.get("class") for tag, a in found.all("td")][1] == "number"


def test_the_page_is_the_same_bytes_again_and_in_another_process(tmp_path: Path) -> None:
    code = (
        "import hashlib; from page_examples import ordinary; from memdiag import page; "
        "print(hashlib.sha256(page.html([ordinary()], title='t').encode()).hexdigest())"
    )
    env = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parent)}
    there = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    here = [hashlib.sha256(page.html([ordinary()], title="t").encode()).hexdigest() for _ in range(2)]
    assert here == [there.strip()] * 2


def big(i: int, *, plots: int = 6) -> Section:
    """A section of about 300 kB."""
    svg = plot(points=2000, name="big").svg if i == 0 else big_svg()
    return Section(
        "score", f"{i:04}.parquet", "q", (Figure("mean loss", f"{i}.5"),), (Plot(svg, "a", "c"),) * plots,
        (Table("top", ("text",) * 5, (("x" * 1000,) * 5,) * 100),), ("n" * 1000,) * 5, (), "memdiag rerun x",
    )  # fmt: skip


def big_svg() -> str:
    """A drawing of about 60 kB."""
    path = '<path d="' + "L 1 1 " * 10_000 + '" />'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72" width="72" height="72">{path}</svg>'


def test_a_page_of_many_reports_stays_below_its_limit_and_says_what_is_left_out() -> None:
    made = page.html([big(i) for i in range(1, 61)], title=TITLE)
    assert page.LIMIT * 0.9 < len(made.encode()) <= page.LIMIT
    found = Parsed(made)
    assert len(found.all("section")) == 60
    assert found.text.count("Left out, for the size of the page: 6 plots and 1 table.") > 40
    assert len(found.all("svg")) >= 6 * 3  # the first have theirs
    assert "60 reports." in found.text


def test_what_does_not_fit_at_all_is_counted() -> None:
    lines = ("\x00" * 600,) * 40  # each letter is an escape of 30 bytes
    made = page.html([Section("score", str(i), "q", notes=lines) for i in range(40)], title=TITLE)
    assert len(made.encode()) <= page.LIMIT
    found = Parsed(made)
    shown = len(found.all("section"))
    assert 0 < shown < 40
    assert f"{40 - shown} more reports do not fit" in found.text
    assert "40 reports." in found.text


def test_every_list_of_a_section_has_an_end() -> None:
    many = Section(
        "score", "s", "q", (Figure("a", "1"),) * 99, (), (Table("t", ("c",) * 99, (("1",) * 99,) * 999),) * 99,
        ("n",) * 99, (("a", "b"),) * 999, "memdiag rerun x\n" * 9999,
    )  # fmt: skip
    found = Parsed(page.html([many], title=TITLE))
    assert "the first 200 of 999 rows, the first 24 of 99 columns" in found.text
    assert "87 tables and 75 figures and 59 notes" in found.text
    assert len(found.all("table")) == page.TABLES
    assert len([1 for tag, a in found.all("dd") if a.get("class") == "value"]) == page.FIGURES


def test_a_plot_that_is_too_large_is_left_out() -> None:
    svg = big_svg().replace("L 1 1 ", "L 1 1 " * 10)
    found = Parsed(page.html([Section("score", "s", "q", plots=(Plot(svg, "a", "c"),))], title=TITLE))
    assert "Left out, for the size of the page: 1 plot." in found.text
    assert not found.all("svg")


# -- colours -----------------------------------------------------------------------------------------------------------


def variables(source: str) -> tuple[dict[str, str], dict[str, str]]:
    """The colours of the light and of the dark scheme."""
    style = source[source.index("<style>") : source.index("</style>")]
    blocks = re.findall(r":root \{([^}]*)\}", style)[:2]
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in blocks)
    return light, {**light, **dark}


def contrast(a: str, b: str) -> float:
    """WCAG 2.2, by its definition."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_text_has_contrast_in_both_schemes(scheme: int, source: str) -> None:
    of = variables(source)[scheme]
    assert (scheme == 1) == (contrast(of["page"], "#000000") < 2)
    for back in ("page", "surface", "note"):
        for text in ("ink", "muted", "accent"):
            assert contrast(of[text], of[back]) >= 4.5, (text, back)
    assert contrast(of["escape"], of["escape-page"]) >= 4.5
    for i in range(1, len(page_svg.COLOURS) + 1):
        assert contrast(of[f"series-{i}"], of["page"]) >= 4.5, i


def test_the_series_of_the_page_are_those_of_the_figures(source: str) -> None:
    light, _ = variables(source)
    assert tuple(light[f"series-{i}"] for i in range(1, 9)) == page_svg.COLOURS


def test_ink_grid_and_series_turn_with_the_scheme_and_other_colours_stay() -> None:
    with page_svg.styled():
        figure = page_svg.new_figure()
        axes = figure.subplots()
        axes.plot([0, 1], color=page_svg.COLOURS[1])
        axes.plot([1, 0], color="#123456")
        axes.text(0, 0, "cell", color=page_svg.ON_LIGHT)
        axes.text(1, 1, "ink")
        axes.axhline(0.5, color="black")
        axes.grid()
    svg = page_svg.inline(figure, name="x")
    assert {"var(--series-2)", "currentColor", "var(--grid)", "var(--muted)", "#123456", "#111111"} <= set(
        re.findall(r"var\(--[\w-]+\)|currentColor|#[0-9a-f]{6}", svg)
    )
    assert not re.search("#000000|#ffffff|" + "|".join(page_svg.COLOURS), svg)
    assert "DejaVu" not in svg


@pytest.mark.parametrize(
    ("colour", "text"),
    [
        ("#000000", "#ffffff"),
        ("#ffffff", "#111111"),
        ("#fde725", "#111111"),
        ("#440154", "#ffffff"),
        ((0.5, 0.5, 0.5, 1), "#111111"),
    ],
)
def test_text_upon_a_cell_is_the_more_readable_one(colour: str | tuple[float, float, float, float], text: str) -> None:
    assert page_svg.on(colour) == text


def test_text_upon_any_colour_has_the_higher_contrast() -> None:
    for grey in range(0, 256, 5):
        colour = f"#{grey:02x}{grey:02x}{grey:02x}"
        assert page_svg.on(colour) == max(
            (page_svg.ON_DARK, page_svg.ON_LIGHT), key=lambda text: contrast(text, colour)
        )


# -- drawings ----------------------------------------------------------------------------------------------------------


def wrapped(inside: str, attributes: str = "") -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"{attributes}>{inside}</svg>'


@pytest.mark.parametrize(
    "svg",
    [
        wrapped("<script>alert(1)</script>"),
        wrapped("<foreignObject><p>x</p></foreignObject>"),
        wrapped("<style>*{display:none}</style>"),
        wrapped("<a href='#x'>x</a>"),
        wrapped("<g onclick='alert(1)'/>"),
        wrapped("", " ONLOAD='alert(1)'"),
        wrapped("<use href='https://example.com/x.svg#a'/>"),
        wrapped("<image href='data:image/svg+xml;base64,AAAA'/>"),
        wrapped("<g style='fill: url(https://example.com/x)'/>"),
        wrapped("<g fill='URL( http://example.com )'/>"),
        wrapped("<set attributeName='href' to='javascript:alert(1)'/>"),
        '<!DOCTYPE svg [<!ENTITY a "b">]>' + wrapped("<text>&a;</text>"),
        "<?xml-stylesheet href='x'?>" + wrapped(""),
        "<svg><g></svg>",
        "<g/>",
        "",
    ],
)
def test_a_drawing_that_could_run_or_load_something_is_refused(svg: str) -> None:
    with pytest.raises(ValueError, match="SVG"):
        page_svg.placed(svg, prefix="p", title="t", description="d")


def test_a_drawing_is_the_same_again_and_keeps_its_text_as_text() -> None:
    a, b = plot("Greek λ, 日本"), plot("Greek λ, 日本")
    assert a.svg == b.svg
    assert ">Greek λ, 日本</text>" in a.svg
    assert "<!" not in a.svg
    assert len(a.svg) < 20_000


def test_a_label_is_no_formula_and_hides_nothing() -> None:
    svg = plot("$x^2$ \u202e\x00<b>").svg
    assert r">$x^2$ \u202e\x00&lt;b&gt;</text>" in svg


def test_a_label_that_nobody_made_fit_hides_nothing_either() -> None:
    with page_svg.styled():
        figure = page_svg.new_figure()
        figure.subplots().set_xlabel("a\u202eb\x00c\ufffe")
    assert r">a\u202eb\x00c\ufffe</text>" in page_svg.inline(figure, name="\ud800")


def test_the_powers_of_a_log_axis_are_drawn() -> None:
    texts = re.findall("<text><tspan.*?</text>", plot(points=200).svg)
    assert "10−2" in [re.sub("<[^>]+>", "", text) for text in texts]


def test_a_placed_drawing_has_its_natural_width_and_no_namespace() -> None:
    svg, width = page_svg.placed(plot().svg, prefix="p", title="t", description="d")
    assert width == round(page_svg.HALF * 96)
    assert "http" not in svg
    assert svg.startswith("<svg viewBox=")
    assert '<title id="p-title">t</title><desc id="p-desc">d</desc>' in svg


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("plain", "plain"),
        ("a\u202eb", "a\\u202eb"),
        ("\x00\n\t\x7f", "\\x00\\n\\t\\x7f"),
        ("\ud800", "\\ud800"),
        ("\ufeff\u200b\u00ad", "\\ufeff\\u200b\\xad"),
        ("\U000e0041", "\\U000e0041"),
        ("\ufffe", "\\ufffe"),
        ("👩\u200d👧", "👩\u200d👧"),
        ("e\u0301", "e\u0301"),
        ("e" + "\u0301" * 6, "e" + "\u0301" * 4 + "\\u0301" * 2),
        ("e\u0301a" + "\u0301" * 4, "e\u0301a" + "\u0301" * 4),
        ("", ""),
    ],
)
def test_hidden_characters_are_written_out(text: str, seen: str) -> None:
    assert plain(text, 300) == seen


@pytest.mark.parametrize(
    ("text", "seen"), [("abc", "abc"), ("abcd", "ab…"), ("ab\u200d👧!", "ab…"), ("x" * 10**6, "xx…")]
)
def test_a_long_text_is_cut_and_says_so(text: str, seen: str) -> None:
    assert cut(text, 3) == seen


def test_shown_text_is_escaped_once_and_marks_escapes() -> None:
    assert str(shown("<b>\x00&amp;", 9)) == '<bdi>&lt;b&gt;<span class="escape">\\x00</span>&amp;amp;</bdi>'


def test_a_dollar_of_a_label_is_a_dollar() -> None:
    assert drawable("$a$") == r"\$a\$"


# -- Markdown ----------------------------------------------------------------------------------------------------------


def rendered(source: str) -> Parsed:
    """What a renderer that allows HTML makes of it."""
    return Parsed(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(source))


def test_the_summary_holds_figures_notes_and_how_to_reproduce() -> None:
    made = page.markdown([ordinary()], title=TITLE, notes=["2 reports are not shown"])
    assert made.startswith("<!-- memdiag ")
    found = rendered(made)
    assert [tag for tag, _ in found.all("h2", "h3", "table", "li", "details", "blockquote")] == [
        "h2", "blockquote", "h3", "table", "li", "details",
    ]  # fmt: skip
    assert [data for tag, data in found.texts if tag in ("td", "strong") and data.strip()] == [
        "MBE, mean over layers", "0.412", "0.396 to 0.428", "n = 128 examples", "most compressed layer", "h.3",
    ]  # fmt: skip
    assert "memdiag rerun run/entropy.parquet\nmemdiag entropy runs/model --data texts.jsonl" in found.text
    assert "Only on the page: 1 plot, 1 table." in found.text


def test_untrusted_text_is_no_markup_of_a_summary() -> None:
    found = rendered(page.markdown([hostile()], title=HOLDING_ALL, notes=HOSTILE))
    assert {tag for tag, _ in found.elements} <= {
        "h2", "h3", "p", "table", "thead", "tbody", "tr", "th", "td", "strong", "ul", "li", "details", "summary", "pre",
        "code", "blockquote",
    }  # fmt: skip
    assert len(found.all("table")) == 1
    rows, cells = len(found.all("tr")), len(found.all("td", "th"))
    assert rows == 1 + len(HOSTILE)
    assert cells == 4 * rows
    for text in HOSTILE[:-1]:
        assert plain(text, page.CELL) in found.text.replace("\u200b", "")


def test_nothing_in_a_summary_notifies_or_links() -> None:
    made = page.markdown([dataclasses.replace(hostile(), reproduce="")], title=HOLDING_ALL)
    prose = re.sub(r"(`+).+?\1", "", made)  # GitHub looks for names in all but code
    found = MarkdownIt("commonmark", {"html": True}).enable("table").render(prose)
    text = re.sub("<[^>]+>", " ", found)
    assert "someone" in text
    assert not re.search(r"@\w|(?<!&)#\d|GH-\d|://|www\.", text, re.IGNORECASE)


def test_the_code_of_a_summary_ends_where_it_should() -> None:
    found = rendered(as_code("a `` b", 99) + "\n\n" + as_shell(["x ```` y", "```", "\u202e"], 99) + "\n\nafter")
    assert [data for tag, data in found.texts if tag == "code"] == ["a `` b", "x ```` y\n```\n\\u202e\n"]
    assert [data for tag, data in found.texts if tag == "p" and data.strip()] == ["after"]


@pytest.mark.parametrize(
    "text",
    [
        "- a",
        "1. a",
        "+ a",
        "# a",
        "> a",
        "---",
        "===",
        "    a",
        "* a",
        "1) a",
        "|a|",
        ":--",
        "<!-- a",
        "<script a",
        "<?a",
    ],
)
def test_the_beginning_of_a_line_begins_no_block(text: str) -> None:
    found = rendered(f"before\n\n{in_markdown(text, 99)}\n")
    assert [tag for tag, _ in found.elements] == ["p", "p"]
    assert found.text.replace("\u200b", "").split() == ["before", *text.split()]


def test_a_bar_ends_no_cell() -> None:
    found = rendered(f"| a | b |\n| -- | -- |\n| {in_markdown('x | y', 9)} | z |\n")
    assert [data for tag, data in found.texts if tag == "td"] == ["x | y", "z"]


def test_a_summary_fits_in_a_comment_and_says_what_is_left_out() -> None:
    made = page.markdown([big(i) for i in range(1, 201)], title=TITLE)
    assert page.MARKDOWN_LIMIT * 0.9 < len(made.encode()) <= page.MARKDOWN_LIMIT
    shown = made.count("\n### ")
    assert f"{200 - shown} of 200 reports are left out" in made


def test_a_summary_of_hostile_reports_fits_as_well() -> None:
    assert len(page.markdown([hostile()] * 50, title=HOLDING_ALL, notes=HOSTILE * 9).encode()) <= page.MARKDOWN_LIMIT


# -- which reports -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    x: int = tables.column(pa.int64(), "a number")


def put(path: Path, kind: str = "score") -> Path:
    """A report of one row."""
    tables.write(path, Row, [[{"x": 1}]], {"report": kind, "schema_version": 1})
    return path


@pytest.fixture
def sectioned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sections that tell a report's kind and no more."""

    def section_of(path: Path, name: str) -> Section:
        return Section(str(tables.read_meta(path)["report"]), name, "q", (Figure("rows", "1"),))

    monkeypatch.setattr("memdiag.page_sections.section_of", section_of, raising=False)


def names(tmp_path: Path, *paths: Path) -> list[str]:
    return [str(path.relative_to(tmp_path)) for path, _ in _search(paths).reports]


def test_a_directory_is_searched_and_its_own_files_come_first(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.parquet", "z/c.parquet", "d/e/f.parquet", "d/g.parquet"):
        put(tmp_path / name)
    assert names(tmp_path, tmp_path) == ["a.parquet", "b.parquet", "d/g.parquet", "d/e/f.parquet", "z/c.parquet"]


def test_files_come_as_given_and_once(tmp_path: Path) -> None:
    b, a = put(tmp_path / "b.parquet"), put(tmp_path / "a.parquet")
    assert names(tmp_path, b, a, b) == ["b.parquet", "a.parquet"]
    assert len(_search([b, tmp_path / ".." / tmp_path.name / "b.parquet"]).reports) == 1
    assert names(tmp_path, b, tmp_path) == ["b.parquet", "a.parquet"]
    (tmp_path / "link.parquet").symlink_to(a)
    assert names(tmp_path, tmp_path) == ["a.parquet", "b.parquet"]


def test_hidden_files_and_the_parts_of_a_report_in_the_making_are_passed_over(tmp_path: Path) -> None:
    for name in ("a.parquet", ".a.parquet.partial", ".b.parquet", ".x/c.parquet", ".d.parquet.parts/0.parquet"):
        put(tmp_path / name)
    put(tmp_path / "e.parts" / "0.parquet")
    (tmp_path / "notes.txt").write_text("no report")
    (tmp_path / "folder.parquet").mkdir()
    assert names(tmp_path, tmp_path) == ["a.parquet"]


def test_a_hidden_directory_that_was_named_is_searched(tmp_path: Path) -> None:
    put(tmp_path / ".x" / "a.parquet")
    assert names(tmp_path, tmp_path / ".x") == [".x/a.parquet"]


@pytest.mark.usefixtures("sectioned")
def test_shards_are_counted_and_not_shown(tmp_path: Path) -> None:
    put(tmp_path / "a.parquet", "counterfactual")
    for i in range(3):
        put(tmp_path / "shards" / f"{i}.parquet", "counterfactual.shard")
    put(tmp_path / "trajectory" / "0.parquet", "train.trajectory")
    made = build([tmp_path])
    assert [section.name for section in made.sections] == ["a.parquet"]
    assert made.notes == (
        "3 reports counterfactual.shard (models) are not shown one by one",
        "1 report train.trajectory (epochs) is not shown one by one",
    )
    assert made.notes[0] in Parsed(made.html).text
    assert made.notes[0] in made.markdown.replace("\\", "")


@pytest.mark.usefixtures("sectioned")
def test_a_shard_that_was_named_is_shown(tmp_path: Path) -> None:
    shard = put(tmp_path / "0.parquet", "counterfactual.shard")
    assert [section.kind for section in build([shard]).sections] == ["counterfactual.shard"]


@pytest.mark.usefixtures("sectioned")
def test_what_is_no_report_is_a_note_in_a_directory_and_an_error_by_name(tmp_path: Path) -> None:
    put(tmp_path / "a.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "foreign.parquet")
    made = build([tmp_path])
    assert [section.name for section in made.sections] == ["a.parquet"]
    assert len(made.notes) == 2
    assert "broken.parquet is not a Parquet file" in made.notes[0]
    assert "foreign.parquet is Parquet but no report of memdiag" in made.notes[1]
    for name in ("broken.parquet", "foreign.parquet", "missing.parquet"):
        with pytest.raises(InputError, match=name):
            build([tmp_path / "a.parquet", tmp_path / name])


def test_nothing_found_is_an_error_that_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"no report of memdiag in {tmp_path}; give"):
        _search([tmp_path])
    (tmp_path / "broken.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"no report of memdiag in .* \(not shown: .*broken.parquet"):
        _search([tmp_path])
    with pytest.raises(InputError, match="no report was given"):
        _search([])


@pytest.mark.usefixtures("sectioned")
def test_names_are_relative_to_the_one_directory_and_whole_for_several(tmp_path: Path) -> None:
    put(tmp_path / "a" / "x.parquet")
    put(tmp_path / "b" / "x.parquet")
    assert [section.name for section in build([tmp_path / "a"]).sections] == ["x.parquet"]
    both = [tmp_path / "a", tmp_path / "b"]
    assert [section.name for section in build(both).sections] == [str(path / "x.parquet") for path in both]


@pytest.mark.usefixtures("sectioned")
def test_the_title_is_that_of_what_was_given(tmp_path: Path) -> None:
    a = put(tmp_path / "a.parquet")
    assert "<title>memdiag: a.parquet</title>" in build([a]).html
    assert f"<title>memdiag: {tmp_path.name}</title>" in build([tmp_path]).html
    assert "<title>memdiag: 2 reports</title>" in build([a, put(tmp_path / "b" / "b.parquet")]).html
    assert "<title>Mine</title>" in build([tmp_path], title="Mine").html
    assert "## Mine\n" in build([tmp_path], title="Mine").markdown


@pytest.mark.usefixtures("sectioned")
def test_the_page_and_its_summary_are_written_and_replaced(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.parquet")
    html, markdown = tmp_path / "new" / "page.html", tmp_path / "new" / "page.md"
    made = report(tmp_path / "in", html=html, markdown=markdown)
    assert html.read_text(encoding="utf-8") == made.html
    assert markdown.read_text(encoding="utf-8") == made.markdown
    put(tmp_path / "in" / "b.parquet")
    again = report(tmp_path / "in", html=str(html), markdown=str(markdown))
    assert html.read_text(encoding="utf-8") == again.html != made.html
    assert markdown.read_text(encoding="utf-8") == again.markdown != made.markdown
    assert sorted(path.name for path in html.parent.iterdir()) == ["page.html", "page.md"]


@pytest.mark.usefixtures("sectioned")
def test_nothing_is_written_unless_asked_for(tmp_path: Path) -> None:
    put(tmp_path / "a.parquet")
    assert report(tmp_path).sections[0].name == "a.parquet"
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


@pytest.mark.usefixtures("sectioned")
@pytest.mark.parametrize("option", ["html", "markdown"])
def test_what_is_no_page_of_ours_is_not_replaced(option: str, tmp_path: Path) -> None:
    put(tmp_path / "a.parquet")
    other = tmp_path / "index.html"
    text = '<!DOCTYPE html>\n<meta name="generator" content="other">\n' + " " * 5000
    other.write_text(text + '<meta name="generator" content="memdiag 0.1.0"><!-- memdiag 1 -->')
    with pytest.raises(InputError, match="is no page of memdiag; --force or another name"):
        report(tmp_path, **{option: other})
    assert other.read_text().startswith(text)
    report(tmp_path, **{option: other}, force=True)
    assert other.read_text() != text
    report(tmp_path, **{option: other})  # now it is ours


@pytest.mark.usefixtures("sectioned")
def test_a_report_is_never_replaced_by_its_page(tmp_path: Path) -> None:
    a = put(tmp_path / "a.parquet")
    before = a.read_bytes()
    with pytest.raises(InputError, match="is one of the reports to show"):
        report(a, html=a, force=True)
    with pytest.raises(InputError, match="is one of the reports to show"):
        report(tmp_path, html=a, force=True)
    assert a.read_bytes() == before


@pytest.mark.usefixtures("sectioned")
def test_places_that_cannot_be_written_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    a = put(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="is a directory"):
        report(a, html=tmp_path)
    with pytest.raises(InputError, match="cannot hold both"):
        report(a, html=tmp_path / "x", markdown=tmp_path / "y" / ".." / "x")
    with pytest.raises(InputError, match="cannot be written"):
        report(a, html=a / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


@pytest.mark.parametrize(
    ("header", "rows", "columns", "size"),
    [
        ((), (), 0, page.LARGEST),
        (("a", "b"), (("1", "2"),), 2, page.LARGEST),  # small tables keep the size of type
        (("a",) * 10, (("0.123456789",) * 10,), 10, 490 / (10 * (11 * 0.62 + 1.1))),
        (("a",) * 20, (("0.123456789",) * 20,), 12, page.SMALLEST),  # 98 em are there, and a column takes 7.92
        (("two words here",) * 10, (("1",) * 10,), 10, page.LARGEST),  # a heading may be broken at spaces
        (("a",), (("x" * 5000,),), 1, page.LARGEST),  # a long cell is broken anywhere
        (("y" * 5000, "b"), (("1", "2"),), 2, page.LARGEST),  # so is a long heading
    ],
)
def test_columns_that_fit_on_paper_and_their_size(header, rows, columns, size):
    found = page._on_paper(header, rows, [True] * len(header))
    assert found == (columns, pytest.approx(size))
    words = page._on_paper(header, rows, [False] * len(header))
    assert words[0] >= columns
