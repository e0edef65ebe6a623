"""Reports of `memdiag train`: how training went, and what it was trained on."""

from __future__ import annotations

from memdiag import page_svg, train_view
from memdiag.page_sections import shown
from memdiag.page_sections.building import Building, floats, thinned
from memdiag.page_sections.plain import first_rows

MOST_EPOCHS = 300  # points of a curve
NAMES = ("epoch", "step", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "corrupted_accuracy",
         "clean_accuracy")  # fmt: skip
LABELS = {
    "test_accuracy": "Right, held out",
    "train_accuracy": "Right when presented",
    "clean_accuracy": "Of these, clean",
    "corrupted_accuracy": "Wrong labels learned",
}
MOST_LABELS = 30


def history(page: Building) -> None:
    """The last epoch's figures, loss and accuracies over the epochs."""
    rows = page.records(100_000, NAMES)
    last = rows[-1]
    with page.part("headline figures"):
        at = f"epoch {last['epoch']}, no interval: one run"
        for name, label in LABELS.items():
            page.figure(label, last[name], note=at)
        page.figure("Loss when presented", last["train_loss"], note=at, unit="nats")
        half = [row["epoch"] for row in rows if (row["corrupted_accuracy"] or 0) >= 0.5]
        if half:
            page.figure("Epoch in which half of the wrong labels were learned", half[0])
    with page.part("the curves"):
        some = [rows[i] for i in thinned(len(rows), MOST_EPOCHS)]
        if len(some) < len(rows):
            page.note(f"of {len(rows):,} epochs {len(some)}, evenly spaced, are drawn")
        canvas = page_svg.new_figure(7.2, 4.4)
        above, below = canvas.subplots(2, 1, sharex=True)
        train_view.draw_history(above, below, some)
        below.locator_params(axis="x", integer=True)
        loss = floats(some, "train_loss")
        told = "; ".join(
            f"{label.lower()} from {shown.number(rows[0][name])} to {shown.number(last[name])}"
            for name, label in LABELS.items()
            if last[name] is not None and rows[0][name] is not None
        )
        goes = "falls" if loss[-1] < loss[0] else "goes"
        alt = f"Loss {goes} from {shown.number(float(loss[0]))} to {shown.number(float(loss[-1]))} nats"
        page.plot(canvas, f"{alt} over {len(rows):,} epochs; {told}.", "Loss (nats) and accuracies over the epochs.")
    with page.part("the table of epochs"):
        some = [rows[i] for i in thinned(len(rows), 12)]
        page.table("Epochs, evenly spaced", [shown.words(n) for n in NAMES], [[row[n] for n in NAMES] for row in some])


def examples(page: Building) -> None:
    """How many, how many with a wrong label, and how the labels are spread."""
    with page.part("headline figures"):
        n, known, wrong = page.one("SELECT count(*), count(corrupted), count(*) FILTER (WHERE corrupted) FROM report")
        page.figure("Examples trained on", n)
        if known:
            page.figure(
                "With a wrong label", wrong, note=f"{shown.share(wrong, known)} of {known:,} whose truth is known"
            )
            if known < n:
                page.note(f"of {n - known:,} examples it is not known whether the label is wrong")
        else:
            page.note("it is not known of any example whether its label is wrong")
    with page.part("the labels"):
        _draw_labels(page)
    with page.part("the first rows"):
        first_rows(page)


def _draw_labels(page: Building) -> None:
    found = page.sql(
        "SELECT label, count(*), count(*) FILTER (WHERE corrupted) FROM report WHERE label IS NOT NULL GROUP BY 1 "
        "ORDER BY 2 DESC, 1"
    )
    if not found:
        return
    some = sorted(found[:MOST_LABELS])
    canvas = page_svg.new_figure(7.2, 2.6)
    axis = canvas.subplots()
    at = range(len(some))
    axis.bar(at, [n - wrong for _, n, wrong in some], color="C0", label="right, or not known")
    axis.bar(
        at, [wrong for *_, wrong in some], bottom=[n - wrong for _, n, wrong in some], color="C1", label="wrong label"
    )
    axis.set_xticks(at, [str(label) for label, *_ in some])
    axis.set(xlabel="label trained on", ylabel="examples")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    most, least = max(some, key=lambda row: row[1]), min(some, key=lambda row: row[1])
    alt = (
        f"Bars of {len(found):,} labels: most examples have label {most[0]}, {most[1]:,}, fewest {least[0]}, "
        f"{least[1]:,}."
    )
    more = f"; the {MOST_LABELS} most frequent of {len(found):,}" if len(found) > MOST_LABELS else ""
    page.plot(canvas, alt, f"Examples by label{more}.")
