"""Reports of `memdiag score --second-split`: how fast is what forgotten, beside what any score has."""

from __future__ import annotations

import numpy as np

from memdiag import page_svg
from memdiag.page_sections import score, shown
from memdiag.page_sections.building import MOST_POINTS, Building
from memdiag.page_sections.panels import draw_density
from memdiag.page_text import drawable


def second_split(page: Building) -> None:
    """As any score; before it how fast halves are forgotten, and forgetting beside confidence."""
    networks = page.meta.get("networks")
    with page.part("what the networks learned and kept"):
        if other := score.of_other_rows(page):
            page.note(f"{other}: what the networks learned and kept is left out")
        elif not networks:
            page.note("the metadata does not tell what the networks learned")
        else:
            for key, label in (("learned", "Right after stage 1"), ("kept", "Of these, still right after stage 2")):
                told = [network[key] for network in networks if network.get(key) is not None]
                _over_networks(page, label, told)
    with page.part("the curve of forgetting"):
        _draw_forgetting(page)
    with page.part("the plane of forgetting and confidence"):
        _draw_plane(page)
    score.examples(page)


def _over_networks(page: Building, label: str, told: list[float]) -> None:
    from memdiag.reproduce_claims import mean_of, t_interval

    if told:
        lo, hi = t_interval(told)
        page.figure(label, mean_of(told), lo, hi, f"mean of n = {len(told)} networks")


def _groups(page: Building) -> dict[str, tuple[str, str]]:
    """label -> (condition, colour), those of --truth apart if the report says which are."""
    if "truth" not in page.columns:
        return {"all": ("true", page_svg.COLOURS[0])}
    return {"others": ("NOT truth", page_svg.COLOURS[0]), score.marked(page): ("truth", page_svg.COLOURS[1])}


def _draw_forgetting(page: Building) -> None:
    """Share of examples forgotten after each epoch of stage 2; who never is, in no seed, stays out of it."""
    canvas = page_svg.new_figure(7.2, 3.0)
    axis = canvas.subplots()
    (last,) = page.one("SELECT max(second_split_forgetting) FROM report")
    told = []
    for label, (which, colour) in _groups(page).items():
        found = page.sql(
            "SELECT second_split_forgetting, count(*), count(*) FILTER (WHERE n_censored = n_seeds) FROM report "
            f"WHERE second_split_forgetting IS NOT NULL AND {which} GROUP BY 1 ORDER BY 1"
        )
        if not found:
            continue
        total, never = sum(n for _, n, _ in found), sum(censored for *_, censored in found)
        at, shares = [0.0], [0.0]
        for epoch, n, censored in found[:MOST_POINTS]:
            at.append(float(epoch))
            shares.append(shares[-1] + (n - censored) / total)
        axis.step(at, shares, where="post", color=colour, label=f"{drawable(label)} (n = {total:,})")
        middle = next((epoch for epoch, reached in zip(at, shares) if reached >= 0.5), None)
        half = "fewer than half are forgotten" if middle is None else f"half are forgotten by epoch {middle:.3g}"
        told.append(f"of the {label}, {half}, {shown.share(never, total)} never are")
    if not told:
        page.note("no example has an epoch in which it was forgotten")
        return
    axis.set(xlabel="epoch of stage 2, mean over seeds", ylabel="share forgotten", ylim=(0, 1.02), xlim=(0, last))
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    alt = f"Share of examples forgotten over the epochs of stage 2: {'; '.join(told)}."
    page.plot(canvas, alt, "How fast one half is forgotten while the other is learned; a seed without is epochs + 1.")


def _draw_plane(page: Building) -> None:
    """Confidence in stage 2 against the epoch of forgetting."""
    bins = 40
    low, high = page.one("SELECT min(second_split_forgetting), max(second_split_forgetting) FROM report")
    groups = _groups(page)
    canvas = page_svg.new_figure(7.2, 3.4)
    axes = canvas.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    n_of: dict[str, int] = {}
    for axis, (label, (which, _)) in zip(axes, groups.items()):
        found = page.sql(
            f"SELECT least(floor((second_split_forgetting - ?) / ?), {bins - 1}), "
            f"least(floor(stage2_confidence * {bins}), {bins - 1}), count(*) FROM report "
            f"WHERE {which} AND isfinite(second_split_forgetting) AND isfinite(stage2_confidence) GROUP BY 1, 2",
            (low, (high - low or 1.0) / bins),
        )
        counts = np.full((bins, bins), np.nan)
        for x, y, n in found:
            counts[int(y), int(x)] = n
        n_of[label] = int(np.nansum(counts))
        draw_density(canvas, axis, counts, (low, high if high > low else low + 1.0, 0.0, 1.0))
        axis.set(xlabel="epoch of forgetting", title=f"{drawable(label)} (n = {n_of[label]:,})")
    axes[0].set_ylabel("confidence in stage 2")
    told = " and ".join(f"{n:,} {label}" for label, n in n_of.items())
    page.plot(
        canvas,
        f"Density of {told} examples by epoch of forgetting and confidence.",
        "Forgotten early and with little confidence: bottom left. Means over seeds; counts on a log scale.",
    )
