"""Figures of a page: drawn by matplotlib, put inline as SVG, in colours that turn with light and dark.

Draw inside `with styled():`. The ink (black where nothing else is said), the grid and COLOURS become variables of the
page's style sheet; every other colour stays as it is, so text upon a coloured cell takes `on(colour)`, not black.
Needs no torch.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from memdiag.page_text import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Series in the order to use them; on the page a dark screen gets lighter ones, see page.html.jinja
COLOURS = ("#1f5fa8", "#b8430b", "#1a7a48", "#7a3bb0", "#8a5a00", "#b3246b", "#56616c", "#0e6f7e")
INK, MUTED, GRID = "#1b1f24", "#57606a", "#d5dbe1"
ON_DARK, ON_LIGHT = "#ffffff", "#111111"  # text upon a cell
WIDE, HALF = 7.2, 3.7  # inches
DPI = 150  # of the parts that are pictures: heat maps, clouds of points

_VARIABLE = {
    **{colour: f"var(--series-{i})" for i, colour in enumerate(COLOURS, 1)},
    INK: "currentColor",
    "#000000": "currentColor",  # what matplotlib takes where nothing is said
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    "#b0b0b0": "var(--grid)",  # matplotlib's own grid
}
_TAGS = {
    *("svg", "g", "defs", "path", "use", "clipPath", "rect", "text", "tspan", "image", "circle", "ellipse", "line"),
    *("polyline", "polygon", "pattern", "title", "desc"),
}
_LENGTHS = {"d", "x", "y", "width", "height", "points", "transform"}
_TEXT = 500  # characters of one text of a figure
_PICTURE = "data:image/png;base64,"


@contextmanager
def styled() -> Iterator[None]:
    """Everything drawn inside has the page's look."""
    import matplotlib
    from cycler import cycler

    style: dict[Any, Any] = {
        "font.size": 9.5,
        "font.family": "sans-serif",
        "text.color": INK,
        "axes.prop_cycle": cycler(color=COLOURS),
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.labelsize": 9.5,
        "axes.linewidth": 0.8,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 10.5,
        "axes.titlepad": 8,
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "xtick.major.width": 0.8,
        "ytick.major.width": 0.8,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.8,
        "lines.markersize": 4,
        "errorbar.capsize": 2.5,
        "image.cmap": "viridis",
    }
    with matplotlib.rc_context(style):
        yield


def new_figure(width: float = WIDE, height: float = 3.2) -> Figure:
    """An empty figure, constrained layout. Use it inside `styled`.

    Args:
        width: inches; WIDE fills the page, two of HALF stand side by side, and a phone shows one without scrolling.
        height: inches.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=DPI)


def on(colour: str | tuple[float, float, float] | tuple[float, float, float, float]) -> str:
    """The colour of text upon a cell of this colour: white or near black, whichever has the higher contrast.

    WCAG 2.2: luminance L = 0.2126 R + 0.7152 G + 0.0722 B of linear channels, contrast (L1 + 0.05) / (L2 + 0.05).
    """
    from matplotlib.colors import to_rgb

    here, dark = (
        sum(
            weight * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
            for weight, c in zip((0.2126, 0.7152, 0.0722), to_rgb(of))
        )
        for of in (colour, ON_LIGHT)
    )
    return ON_DARK if 1.05 / (here + 0.05) > (here + 0.05) / (dark + 0.05) else ON_LIGHT


def inline(figure: Figure, *, name: str) -> str:
    """A figure as an SVG element for HTML: the same figure gives the same text.

    Args:
        figure: drawn inside `styled`.
        name: begins its ids; no two figures of a page should share one.
    """
    import matplotlib

    file = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing")  # text stays text: the reader's fonts draw it
        figure.savefig(file, format="svg", metadata=nothing, transparent=True)
    source = file.getvalue()
    root = ElementTree.fromstring(_legal(source[source.index("<svg") :]))
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("}style", "}metadata")):
                parent.remove(child)
    _without_namespaces(root)
    for element in root.iter():
        _restyle(element)
    root.attrib = {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": root.attrib["viewBox"],
        "width": root.attrib["width"],
        "height": root.attrib["height"],
        "fill": "currentColor",  # matplotlib leaves out what is black
        "stroke-linejoin": "round",
        "stroke-linecap": "butt",
    }
    _rename(root, "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name))
    return ElementTree.tostring(root, encoding="unicode")


def placed(svg: str, *, prefix: str, title: str, description: str) -> tuple[str, int]:
    """An SVG for its place on a page: nothing in it can run or load, its ids are its own, and it has a name.

    Args:
        svg: from `inline`.
        prefix: begins its ids.
        title: short.
        description: what is seen.
    Returns:
        the SVG, and its natural width in pixels.
    Raises:
        ValueError: it holds something that `inline` does not make.
    """
    if "<!" in svg or "<?" in svg:
        raise ValueError("an SVG with a declaration; give what page_svg.inline returns")
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise ValueError(f"an SVG that is not well-formed: {error}") from None
    _without_namespaces(root)
    for element in root.iter():
        _check(element)
    if root.tag != "svg":
        raise ValueError(f"an SVG that begins with <{root.tag}>")
    _rename(root, prefix)
    width, height = (float(length) for length in root.attrib["viewBox"].split()[2:])
    for name in ("xmlns", "width", "height"):
        root.attrib.pop(name, None)
    root.attrib |= {
        "role": "img",
        "aria-labelledby": f"{prefix}-title {prefix}-desc",
        "style": f"aspect-ratio: {width:g} / {height:g}",
    }
    for i, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{prefix}-{tag}"})
        element.text = text
        root.insert(i, element)
    return ElementTree.tostring(root, encoding="unicode"), round(width * 4 / 3)  # points of 1/72 inch, pixels of 1/96


def _legal(source: str) -> str:
    """Without the characters that XML has no way to write, as visible escapes."""
    return re.sub(
        "[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]",
        lambda found: found[0].encode("unicode_escape").decode(),
        source,
    )


def _without_namespaces(root: ElementTree.Element) -> None:
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name in list(element.attrib):
            if "}" in name:
                element.attrib[name.rpartition("}")[2]] = element.attrib.pop(name)


def _restyle(element: ElementTree.Element) -> None:
    """Colours as variables, the page's font, two decimals, no blanks between elements."""
    for name, value in element.attrib.items():
        if name in _LENGTHS:
            element.attrib[name] = " ".join(re.sub(r"-?\d+\.\d+(?:e[-+]?\d+)?", _rounded, value).split())
        elif name == "style":
            kept = [part.strip() for part in value.split(";") if not part.strip().startswith("font-family")]
            element.attrib[name] = _coloured("; ".join(kept))
        elif name in ("fill", "stroke"):
            element.attrib[name] = _coloured(value)
    # the blanks between a text and its parts are none of the text
    is_text = element.tag == "tspan" or (element.tag == "text" and len(element) == 0)
    element.text = plain(element.text, _TEXT) if is_text and element.text else None
    element.tail = None


def _rounded(found: re.Match[str]) -> str:
    text = f"{float(found[0]):.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _coloured(style: str) -> str:
    return re.sub("#[0-9a-f]{6}", lambda found: _VARIABLE.get(found[0], found[0]), style)


def _rename(root: ElementTree.Element, prefix: str) -> None:
    """Short ids of its own for what is referred to; no others."""
    used = {
        target
        for element in root.iter()
        for value in element.attrib.values()
        for target in re.findall(r"url\(#([^)]+)\)|^#(.+)$", value)
        for target in target
        if target
    }
    names: dict[str, str] = {}
    for element in root.iter():
        own = element.attrib.pop("id", "")
        if own in used:
            names[own] = element.attrib["id"] = f"{prefix}-{len(names)}"
    for element in root.iter():
        for name, value in element.attrib.items():
            if name == "href" and value.startswith("#"):
                element.attrib[name] = f"#{names.get(value[1:], prefix)}"
            elif name != "id" and "url(#" in value:
                element.attrib[name] = re.sub(r"url\(#([^)]+)\)", lambda m: f"url(#{names.get(m[1], prefix)})", value)


def _check(element: ElementTree.Element) -> None:
    if element.tag not in _TAGS:
        raise ValueError(f"an SVG with <{element.tag}>; give what page_svg.inline returns")
    for name, value in element.attrib.items():
        refers = name == "href" and not value.startswith(("#", _PICTURE))
        loads = re.search(r"url\((?!#)|@import|javascript:", value, re.IGNORECASE)
        if name.lower().startswith("on") or refers or loads:
            raise ValueError(f"an SVG with {name}={value[:40]!r}; give what page_svg.inline returns")
