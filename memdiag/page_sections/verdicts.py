"""Reports of `memdiag check` and `memdiag diff`: rules with their verdicts, what changed by column, who moved."""

from __future__ import annotations

from collections.abc import Sequence

from memdiag.page_sections import shown
from memdiag.page_sections.building import Building, Row
from memdiag.page_sections.panels import Strip, strips

MOST_STRIPS = 24
TOP = 40
FIELDS = ("rule", "sql", "verdict", "observed", "lo", "hi", "limit", "least", "comparison", "n", "confidence", "method",
          "p", "q", "note")  # fmt: skip


def check(page: Building) -> None:
    """How many rules pass, and every rule: observed with its interval, the limit, the verdict."""
    rows = page.records(columns=FIELDS)
    with page.part("headline figures"):
        for verdict in ("fail", "inconclusive", "pass"):
            some = [str(row["rule"])[:60] for row in rows if row["verdict"] == verdict]
            page.figure(verdict.capitalize(), len(some), note=shown.listed(some, 3) if verdict != "pass" else "")
        page.figure("Rules", page.count(), note=_subject(page))
        _pairs(page)
    with page.part("the rules side by side"):
        _draw_rules(page, rows)
    with page.part("the table of rules"):
        is_diff = any(row["p"] is not None for row in rows)
        header = ["rule", "verdict", "observed", "interval", "limit", "n", *(["p", "q"] if is_diff else []), "note"]
        cells = [
            [
                row["rule"],
                row["verdict"],
                shown.number(row["observed"], shown.places_of(row["lo"], row["hi"])),
                _ends(row),
                _limit(row),
                row["n"],
                *([row["p"], row["q"]] if is_diff else []),
                row["note"],
            ]
            for row in rows
        ]
        page.table("Rule by rule", header, cells)
    for row in rows:
        if row["verdict"] == "inconclusive" and row["note"]:
            page.note(f"{str(row['rule'])[:100]}: {row['note']}")


def _subject(page: Building) -> str:
    """What was checked, as far as the metadata tells."""
    options, of = page.meta.get("options"), page.meta.get("of")
    found = options.get("report") if isinstance(options, dict) else None
    rows = of.get("rows") if isinstance(of, dict) else None
    about = [str(found)] if found else []
    about += [f"{rows:,} rows"] if isinstance(rows, int) else []
    return f"of {', '.join(about)}" if about else ""


def _pairs(page: Building) -> None:
    """How many rows of the two reports stand beside each other, and what the comparison noted."""
    of, notes = page.meta.get("of"), page.meta.get("notes")
    if isinstance(of, dict) and "paired" in of:
        alone = (
            f"{shown.number(of.get('added'))} rows only in the new report, {shown.number(of.get('removed'))} only in "
            "the base"
        )
        page.figure("Pairs of rows", of["paired"], note=alone)
    for note in notes if isinstance(notes, list) else []:
        page.note(str(note))


def _limit(row: Row) -> str | None:
    if row["limit"] is None:
        return None
    if row["least"] is not None:
        return f"{shown.number(row['least'])} to {shown.number(row['limit'])}"
    return f"{row['comparison'] or ''} {shown.number(row['limit'])}".strip()


def _ends(row: Row) -> str | None:
    text = shown.interval(row["lo"], row["hi"])
    return f"{text} ({row['confidence']:.0%})" if text and row["confidence"] is not None else text or None


def _draw_rules(page: Building, rows: Sequence[Row]) -> None:
    known = [row for row in rows if row["observed"] is not None]
    if len(known) > MOST_STRIPS:
        page.note(f"of {len(known)} rules the first {MOST_STRIPS} are drawn")
    found = []
    for row in known[:MOST_STRIPS]:
        sign, limit = str(row["comparison"] or ""), row["limit"]
        low = row["least"] if row["least"] is not None else limit if sign.startswith(">") or sign == "=" else None
        high = limit if sign.startswith("<") or sign in ("=", "between") else None
        good = {"pass": True, "fail": False}.get(row["verdict"])
        found.append(Strip(str(row["rule"]), row["observed"], row["lo"], row["hi"], low, high, good=good))
    if found:
        fails = [strip.label[:60] for strip in found if strip.good is False]
        rules = f"{len(found)} rule{'s' if len(found) > 1 else ''}"
        alt = f"{rules}, each on its own scale: {sum(strip.good is True for strip in found)} pass"
        page.plot(
            strips(found),
            f"{alt}; failed: {shown.listed(fails)}." if fails else f"{alt}, none fails.",
            "Observed with its interval (dot, bar) and what the rule allows (shaded); every line has its own scale.",
        )


def columns(page: Building) -> None:
    """Per column how many rows changed, and the mean difference with its paired interval."""
    rows = page.records()
    moved = [row for row in rows if row.get("difference") is not None]
    with page.part("headline figures"):
        beyond = [str(row.get("column")) for row in moved if _excludes_zero(row)]
        page.figure("Mean differences whose interval leaves out 0", len(beyond), note=shown.listed(beyond))
        for row in sorted(moved, key=lambda row: not _excludes_zero(row))[:4]:
            n = row.get("n")
            about = f"n = {n:,} pairs" if isinstance(n, int) else ""
            page.figure(f"New − base, {row.get('column')}", row["difference"], row.get("lo"), row.get("hi"), about)
        page.figure("Columns compared", page.count())
        _pairs(page)
    with page.part("the differences side by side"):
        differing = [row for row in moved if row.get("changed") != 0]
        if len(differing) > MOST_STRIPS:
            page.note(f"of {len(differing)} columns that differ the first {MOST_STRIPS} are drawn")
        found = [
            Strip(str(r.get("column")), r["difference"], r.get("lo"), r.get("hi")) for r in differing[:MOST_STRIPS]
        ]
        if found:
            first = found[0]
            alt = (
                f"Mean differences of {len(found)} columns, each on its own scale; {len(beyond)} intervals leave out "
                "0. "
            )
            alt += f"{first.label}: {shown.with_interval(first.value, first.lo, first.hi)}."
            page.plot(
                strips(found, zero=True),
                alt,
                "New minus base, mean over the pairs with its paired interval; the line "
                "marks 0, every line has its own scale.",
            )
    with page.part("the table of columns"):
        names = [name for name in page.columns if any(row.get(name) is not None for row in rows)]
        page.table(
            "Column by column", [shown.words(name) for name in names], [[row.get(n) for n in names] for row in rows]
        )


def _excludes_zero(row: Row) -> bool:
    lo, hi = row.get("lo"), row.get("hi")
    return (lo is not None and lo > 0) or (hi is not None and hi < 0)


def movers(page: Building) -> None:
    """The rows that moved most, those that came and those that went."""
    rows = page.records()
    with page.part("headline figures"):
        _pairs(page)
        page.figure("Rows listed", page.count())
        for change in ("moved", "added", "removed"):
            page.figure(change.capitalize(), sum(row.get("change") == change for row in rows), note="listed")
    with page.part("the rows that moved"):
        # the largest of every column before the second ones, as many as there is room for
        some = sorted(sorted(rows, key=lambda row: row.get("rank") or 0)[:TOP], key=rows.index)
        names = [name for name in page.columns if any(row.get(name) is not None for row in some)]
        cut = f", {len(some)} of {len(rows):,}" if len(some) < len(rows) else ""
        heads, cells = [shown.words(name) for name in names], [[row.get(name) for name in names] for row in some]
        page.table(f"The largest movers of every column{cut}", heads, cells)
