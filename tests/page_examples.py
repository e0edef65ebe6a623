"""Sections of a page to test with: an ordinary one, and one of texts that want to break out."""

from __future__ import annotations

import numpy as np

from memdiag import page_svg
from memdiag.page import Figure, Plot, Section, Table
from memdiag.page_text import drawable

HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</svg></figure><script>alert(2)</script>",
    "]]><!-- --><![CDATA[<b>",
    '" onmouseover="alert(3)" x="',
    "' onfocus='alert(4)' autofocus='",
    "javascript:alert(5)",
    "&lt;script&gt;alert(6)&lt;/script&gt;",
    "{{ 7 * 7 }}{% raw %}",
    "</title></style><style>*{display:none}</style>",
    "https://example.com/a?b=c",
    "\u202egnp.exe",
    "\u2066\u2067isolates\u2069",
    "null\x00byte and bell\x07",
    "line\nbreak, tab\t, separator\u2028, return\r",
    "\ud800 half a pair",
    "a" + "\u0301" * 60,
    "שלום עולם (12)",
    "مرحبا بالعالم 123",
    "👩‍👩‍👧‍👦 😀 日本語",
    "$x^2$ and $",
    "@someone #12 GH-7 www.example.com `code` | [a](b) ![c](d) **e** ~~f~~ <details>",
    "x" * 1_000_000,
)
HOLDING_ALL = "".join(HOSTILE[:-1])


def plot(
    label: str = "loss", *, name: str = "plot", points: int = 20, width: float = page_svg.HALF, dense: bool = False
) -> Plot:
    """Two lines on a log scale, and a cell of a heat map."""
    with page_svg.styled():
        figure = page_svg.new_figure(width, 3)
        left, right = figure.subplots(1, 2)
        x = np.arange(1, points + 1)
        left.plot(x, 1.0 / x, label=drawable(label))
        left.fill_between(x, 0.5 / x, 2.0 / x, alpha=0.2)
        left.set(xlabel="step", ylabel="loss (nats)", yscale="log")
        left.grid(axis="y")
        left.legend().set_in_layout(False)  # a long label must not squeeze the axes
        right.imshow([[0.0, 1.0], [0.5, 0.2]])
        right.text(0, 0, "0.0", color=page_svg.on("#440154"))
    alt = f"The {label} falls from 1 to {1 / points:.2f}."
    return Plot(page_svg.inline(figure, name=name), alt, f"{label} by step.", dense)


def wide() -> Section:
    """Plots as wide as the page, and tables wider than it and than paper."""
    many = tuple(f"column_{i}" for i in range(20))
    return Section(
        kind="diff.columns",
        name="wide.parquet",
        question="What changed?",
        plots=(plot(name="a", width=page_svg.WIDE), plot(name="b", width=page_svg.WIDE, dense=True)),
        tables=(
            Table("All", ("name of the column", *many), (("a name of words", *["−1,234.56"] * 20),) * 3,
                  (False, *[True] * 20)),
            Table("Intervals", ("score", *["95 % interval"] * 7), (("loss", *["0.99854 to 0.99985"] * 7),),
                  (False, *[True] * 7)),
            Table("Texts", ("id", "text"), (("0123456789" * 8, "of words " * 30),)),
        ),
    )  # fmt: skip


def ordinary(name: str = "run/entropy.parquet") -> Section:
    """What a report of a run looks like."""
    return Section(
        kind="entropy",
        name=name,
        question="How compressed is what each layer holds?",
        figures=(
            Figure("MBE, mean over layers", "0.412", "0.396 to 0.428", "n = 128 examples"),
            Figure("most compressed layer", "h.3"),
        ),
        plots=(plot(name=name),),
        tables=(
            Table(
                "By layer",
                ("layer", "MBE", "text"),
                (("h.0", "0.41", "short"), ("h.1", "0.40", "a text that is longer than what a cell keeps in a line")),
                (False, True, False),
            ),
        ),
        notes=("One layer has fewer than 50 examples.",),
        provenance=(("checkpoint", "runs/model/step-2000"), ("seed", "0")),
        reproduce="memdiag rerun run/entropy.parquet\nmemdiag entropy runs/model --data texts.jsonl",
    )


def hostile() -> Section:
    """Every text of a section is one that wants to break out."""
    return Section(
        kind=HOSTILE[0],
        name=HOLDING_ALL,
        question=HOLDING_ALL,
        figures=tuple(Figure(text, text, text, text) for text in HOSTILE),
        plots=(
            Plot(plot(HOLDING_ALL, name=HOLDING_ALL).svg, HOLDING_ALL, HOLDING_ALL),
            *(Plot(plot(text, name=text).svg, text, text) for text in HOSTILE[:4]),
        ),
        tables=(
            Table(HOLDING_ALL, HOSTILE, (HOSTILE, HOSTILE[::-1]), ()),
            Table("Most memorized", ("text", "loss"), tuple((text, "1.0") for text in HOSTILE), (False, True)),
        ),
        notes=HOSTILE,
        provenance=tuple(zip(HOSTILE, HOSTILE)),
        reproduce="\n".join(HOSTILE),
    )
