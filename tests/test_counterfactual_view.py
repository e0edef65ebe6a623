"""What the screen and the plots show of counterfactual reports: nulls, hostile names, one model, nothing at all."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from memdiag import counterfactual_view, memorization, tables
from memdiag.counterfactual_report import Counterfactual, CounterfactualOptions
from memdiag.counterfactual_rows import CounterfactualRow, SizeRow, TurnOverRow
from memdiag.counterfactual_summary import BINS, TOP, summary_of
from memdiag.memorization import Sums

HOSTILE = [
    "\x1b[31mred\x1b[0m", "\u202eltr\u202c", "x" * 10_000, "[bold]b[/bold]", "[/]", "back\\", "[red]\\", "",
    "a\nb\tc", "日本語",
]  # fmt: skip
META = {"model": "MLP", "dataset": {"name": "data.jsonl"}, "identity": {"way": "stacked"}, "n_models": 8}


def estimates(included, measure, kind):
    sums = Sums.empty(included.shape[1])
    for coins, values in zip(included, measure):
        sums.add(coins, values)
    return memorization.estimate(sums, kind=kind)


def share(values):
    return float(values.mean()) if len(values) else None


def found_of(included, correct, *, truth=None, ids=None, language=False, held_out=3, influence=None, model="MLP"):
    """A report and a summary as the command makes them, of coins and correctness (m, n)."""
    m, n = included.shape
    kind = "bounded" if language else "binary"
    hard = estimates(included, correct, kind)
    soft = estimates(included, 0.1 + 0.8 * correct, "real" if language else "bounded")
    ids = ids or [f"e{i}" for i in range(n)]
    labels = [None] * n if language else [i % 3 for i in range(n)]
    test = 0.5 if held_out else None
    models = [
        {"accuracy_in": share(c[i]), "accuracy_out": share(c[~i]), "test_accuracy": test, "seconds": None}
        for i, c in zip(included, correct)
    ]
    meta = {**META, "model": model, "n_models": m}
    told = influence or (
        {"pairs": 3 * n, "listed": 0, "significant": 0, "significant_if_shuffled": 0} if held_out else None
    )
    half = slice(0, None, 2), slice(1, None, 2)
    halves = tuple(estimates(included[h], correct[h], kind) for h in half) if m > 1 else None
    about = summary_of(
        hard, soft, halves, models, truth, ids, labels, np.arange(n), told, n_held_out=held_out,
        options=CounterfactualOptions(subset_ratio=0.5), meta=meta,
    )  # fmt: skip
    columns = {
        "row": np.arange(n), "example_id": ids, "group_id": ids, "copies": [1] * n, "label": labels,
        "truth": [None] * n if truth is None else truth,
        **{name: getattr(hard, name) for name in
           ("memorization", "se", "lo", "hi", "p_in", "p_out", "n_in", "n_out", "simplicity")},
        **{f"{name}_soft": getattr(soft, name) for name in ("memorization", "se", "lo", "hi")},
        "soft_in": soft.p_in, "soft_out": soft.p_out, "memorization_copies": hard.memorization,
        "n_without_copies": hard.n_out,
    }  # fmt: skip
    table = tables.from_columns(CounterfactualRow, columns)
    report = tables.Report(
        tables.pa.Table.from_batches([table]), {**meta, "report": "counterfactual"}, Path("r.parquet")
    )
    return Counterfactual(report, json.loads(json.dumps(about, allow_nan=False)), Path("out"), None, report)


def planted(m=8, n=12, seed=0):
    rng = np.random.default_rng(seed)
    included = rng.permuted(np.tile(np.arange(m) % 2 == 0, (n, 1)), axis=1).T
    correct = (included | (rng.random((m, n)) < np.linspace(0, 1, n))).astype(float)
    return included, correct


def shown(found, capsys):
    counterfactual_view.print_table(found)
    out = capsys.readouterr().out
    assert "nan" not in out.lower()
    assert "None" not in out
    assert all(letter.isprintable() or letter == "\n" for letter in out)
    return out


def sound(found, tmp_path, suffix=".png", times=1):
    """Drawn without a warning, and always the same."""
    names = [tmp_path / f"{i}{suffix}" for i in range(times)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in names:
            counterfactual_view.plot(found, name)
    assert names[0].stat().st_size > 1000
    assert len({name.read_bytes() for name in names}) == 1


# -- the main report -----------------------------------------------------------------------------------------------


def test_the_screen_shows_what_the_summary_holds(capsys):
    truth = np.arange(12) < 3
    found = found_of(*planted(), truth=truth)
    out, about = shown(found, capsys), found.summary
    for part in (
        "MLP  8 models, each on 50% of 12 examples (12 coins)",
        "{value:.3f}  ({lo:.3f} to {hi:.3f})".format(**about["memorization"]),
        f"{about['memorized']} ({about['memorized'] / 12:.1%})",
        "(3 of them)",
        "0 of 36 pairs; about 0 by chance",
        f"{about['median_width']:.3f}; at least {about['models_for_width'] - 8:,} more models make it 0.1",
        "note: 8 models: an example's figure is rough below 50",
        "directory: out",
    ):  # fmt: skip
        assert part in " ".join(out.split()) or part in out, part
    top = about["top"][0]
    assert top["example_id"] in ("e0", "e1", "e2")
    (line,) = [line for line in out.splitlines() if line.startswith(f"{top['example_id']} ")]
    assert f"{top['memorization']:.3f}" in line
    assert f"{top['lo']:.2f} … {top['hi']:.2f}" in line
    assert "4 + 4" in line


def test_the_most_memorized_come_first_and_the_soft_measure_breaks_ties():
    included, correct = planted()
    found = found_of(included, correct)
    memory = found.table["memorization"].to_pylist()
    listed = [row["memorization"] for row in found.summary["top"]]
    assert listed == sorted(memory, reverse=True)[:TOP]
    tied = found_of(included, included.astype(float))
    assert [row["example_id"] for row in tied.summary["top"]] == [f"e{i}" for i in range(TOP)]


def test_memorized_is_a_quarter_or_more():
    """4 models in, 4 out; example i is known to i of those out, and to all in: 1 - i / 4."""
    included = np.repeat(np.arange(8) < 4, 5).reshape(8, 5)
    correct = (included | ((np.arange(8) - 4)[:, None] < np.arange(5))).astype(float)
    found = found_of(included, correct)
    assert found.table["memorization"].to_pylist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert found.summary["memorized"] == 4


def test_truth_beside_the_estimates():
    included, correct = planted(n=30)
    truth = np.arange(30) < 10
    found = found_of(included, correct, truth=truth)
    frame, about = found.to_pandas(), found.summary["truth"]
    for name, values in (
        ("auc", frame.memorization),
        ("auc_soft", frame.memorization_soft),
        ("auc_p_out", -frame.p_out),
    ):
        apart = values[truth].to_numpy()[:, None] - values[~truth].to_numpy()
        assert about[name]["value"] == pytest.approx((apart > 0).mean() + (apart == 0).mean() / 2)
    for name, of in (("true", truth), ("other", ~truth)):
        assert about[f"memorization_{name}"] == pytest.approx(frame.memorization[of].mean())
        assert about[f"p_in_{name}"] == pytest.approx(frame.p_in[of].mean())


def test_the_histogram_counts_every_example(capsys):
    included, correct = planted(n=40)
    found = found_of(included, correct)
    memory, counts = found.table["memorization"].to_numpy(), found.summary["histogram"]
    for i, count in enumerate(counts):
        last = i == len(counts) - 1
        inside = (memory >= BINS[i]) & ((memory < BINS[i + 1]) | last)
        assert inside.sum() == count
    out = shown(found, capsys)
    assert f"{counts[-1]:,}\n" in out
    bars = [line for line in out.splitlines() if " to " in line and "█" in line]
    assert max(line.count("█") for line in bars) == counterfactual_view.BAR
    assert all(line.count("█") >= 1 for line in bars)


def test_all_the_same_memorization_is_one_bar(capsys, tmp_path):
    for value in (0.0, 1.0):
        included, _ = planted()
        found = found_of(included, included.astype(float) if value else np.ones(included.shape))
        out = shown(found, capsys)
        assert len([line for line in out.splitlines() if "█" in line]) == 1
        assert sum(found.summary["histogram"]) == 12
        sound(found, tmp_path)


def test_one_model_says_nothing_of_an_example(capsys, tmp_path):
    included, correct = planted(m=1)
    found = found_of(included, correct)
    out = shown(found, capsys)
    assert "12 examples have no value" in out
    assert "memorization, mean over examples               –" in out
    assert "most memorized" not in out
    assert "█" not in out
    sound(found, tmp_path)


def test_some_without_a_value_are_neither_counted_nor_ranked(capsys, tmp_path):
    included, correct = planted()
    included[:, 3] = True
    included[:, 4] = False
    found = found_of(included, correct)
    assert found.summary["without_value"] == 2
    assert sum(found.summary["histogram"]) == 10
    assert len(found.summary["top"]) == 10
    assert not {"e3", "e4"} & {row["example_id"] for row in found.summary["top"]}
    assert "2 examples have no value" in shown(found, capsys)
    sound(found, tmp_path)


def test_nothing_held_out_and_no_truth_are_left_out(capsys, tmp_path):
    found = found_of(*planted(), held_out=0)
    assert found.summary["truth"] is None
    out = shown(found, capsys)
    for part in ("held out", "influence", "suspects"):
        assert part not in out
    sound(found, tmp_path)


@pytest.mark.parametrize("value", [True, False])
def test_a_truth_that_tells_nothing_apart_is_left_out(capsys, tmp_path, value):
    found = found_of(*planted(), truth=np.full(12, value))
    assert found.summary["truth"] is None
    assert "suspects" not in shown(found, capsys)
    sound(found, tmp_path)


def test_truth_beside_no_value_is_a_dash(capsys, tmp_path):
    included, correct = planted(m=1)
    found = found_of(included, correct, truth=np.arange(12) < 2)
    assert "memorization of suspects / others              – / –" in shown(found, capsys)
    sound(found, tmp_path)


def test_a_language_model_is_told_as_one(capsys, tmp_path):
    found = found_of(*planted(), language=True)
    out = shown(found, capsys)
    assert "token accuracy, held out" in out
    assert "the same of log-probability" in out
    (line,) = [line for line in out.splitlines() if line.startswith(f"{found.summary['top'][0]['example_id']} ")]
    assert line.split()[1] == "–"
    sound(found, tmp_path)


def test_hostile_names_do_not_steer_the_terminal(capsys, tmp_path):
    included, _ = planted(n=10)
    found = found_of(included, included.astype(float), ids=HOSTILE, model="[/]\x1b[2J[red]m\\ $\\frac$日")
    out = shown(found, capsys)
    for part in (
        "?[31mred?[0m",
        "?ltr?",
        "x" * 59 + "…",
        "[bold]b[/bold]",
        "back\\",
        "a?b?c",
        "日本語",
        "[/]?[2J[red]m\\ $\\frac$日",
    ):
        assert part in out, part
    assert "x" * 60 not in out
    sound(found, tmp_path)


def test_narrow_enough_is_said(capsys):
    found = found_of(*planted())
    about = copy.deepcopy(found.summary)
    about |= {"models_for_width": 8, "width_wanted": 0.9}
    out = shown(Counterfactual(found.report, about, Path("out"), None, found.models), capsys)
    assert "which is the 0.9 asked for" in out
    about["models_for_width"] = 9
    out = shown(Counterfactual(found.report, about, Path("out"), None, found.models), capsys)
    assert "1 more models make it 0.9" in out


def test_the_json_names_its_files_and_holds_plain_numbers():
    found = found_of(*planted())
    told = json.loads(json.dumps(counterfactual_view.summary(found), allow_nan=False))
    assert told["directory"] == "out"
    assert told["report"] == "r.parquet"
    assert "influence" not in told
    assert told["summary"] == found.summary


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_report_is_drawn(tmp_path, suffix):
    sound(found_of(*planted(), truth=np.arange(12) < 3), tmp_path, suffix, times=2)


def test_memorization_below_zero_is_drawn_too(tmp_path):
    included, _ = planted()
    found = found_of(included, (~included).astype(float))
    assert set(found.table["memorization"].to_pylist()) == {-1.0}
    assert found.summary["histogram"][0] == 12
    sound(found, tmp_path)


# -- sizes ---------------------------------------------------------------------------------------------------------


def sizes_of(calls, mem, model="MLP"):
    """A report of three widths from calls (n,) and memorization (n, 3)."""
    n = len(calls)
    columns = {
        "row": np.repeat(np.arange(n), 3), "example_id": [f"e{i // 3}" for i in range(3 * n)], "label": [0] * (3 * n),
        "truth": [None] * (3 * n), "width": [2, 16, 64] * n, "memorization": mem.ravel(), "se": np.abs(mem.ravel()) + 1,
        "p_in": np.where(np.isnan(mem.ravel()), np.nan, 1.0), "p_out": 1 - mem.ravel(), "n_in": [7] * (3 * n),
        "n_out": [3] * (3 * n), "trajectory": [call for call in calls for _ in range(3)],
    }  # fmt: skip
    table = tables.pa.Table.from_batches([tables.from_columns(SizeRow, columns)])
    null = {"accuracy_in": None, "accuracy_out": 0.5, "test_accuracy": None, "memorization": None, "memorized": 0}
    about = {
        "model": model, "data": "data.jsonl", "widths": [2, 16, 64], "models": 10, "examples": n,
        "of_width": [{"width": width, **null} for width in (2, 16, 64)],
        "trajectories": {call: list(calls).count(call) for call in counterfactual_view.CALLS},
        "called_by_chance": 0.0512 if any(calls) else None, "warnings": ["a [bold] note"],
    }  # fmt: skip
    report = tables.Report(table, {**META, "report": "counterfactual.sizes"}, Path("sizes.parquet"))
    return Counterfactual(report, about, Path("out"))


def test_sizes_are_shown_and_drawn(capsys, tmp_path):
    calls = ["rising", "rising", "falling", "cap", "other", "constant"]
    found = sizes_of(calls, np.linspace(0, 1, 18).reshape(6, 3), model="[/]m\x1b")
    out = shown(found, capsys)
    for part in ("[/]m?  widths 2, 16, 64, 10 models each, 6 examples", "5.1%", "a [bold] note", "–"):
        assert part in out
    (line,) = [line for line in out.splitlines() if line.split()[:1] == ["rising"]]
    assert line.split()[-1] == "2"
    assert line.count("█") == round(counterfactual_view.BAR / 3)
    for suffix in (".png", ".svg"):
        sound(found, tmp_path, suffix, times=2)


def test_sizes_without_a_single_value_are_shown_and_drawn(capsys, tmp_path):
    found = sizes_of([None] * 4, np.full((4, 3), np.nan))
    out = shown(found, capsys)
    assert "by chance" not in out
    assert "█" not in out
    sound(found, tmp_path)


# -- turn-over dropout ---------------------------------------------------------------------------------------------


def turn_over_of(influence, truth=None, ids=None):
    n = len(influence)
    ids = ids or [f"e{i}" for i in range(n)]
    columns = {
        "row": np.arange(n), "example_id": ids, "label": [1] * n, "truth": [None] * n if truth is None else truth,
        "self_influence": influence, "own_loss": np.zeros(n), "flipped_loss": influence, "own_correct": np.ones(n),
        "flipped_correct": np.zeros(n),
    }  # fmt: skip
    table = tables.pa.Table.from_batches([tables.from_columns(TurnOverRow, columns)])
    about = {
        "model": "MLP", "data": "data.jsonl", "networks": 2, "examples": n, "own_accuracy": 1.0,
        "flipped_accuracy": 0.25,
        "self_influence": float(np.mean(influence)),
        "truth": None if truth is None else {"n_true": 2, "auc": {"value": 0.9, "lo": None, "hi": None}},
        "top": [{"example_id": name, "label": 1, "self_influence": 2.5} for name in ids[:10]], "warnings": [],
    }  # fmt: skip
    report = tables.Report(table, {**META, "report": "counterfactual.turn-over-dropout"}, Path("t.parquet"))
    return Counterfactual(report, about, Path("out"))


def test_turn_over_dropout_is_shown_and_drawn(capsys, tmp_path):
    found = turn_over_of(np.arange(10) / 5, truth=np.arange(10) > 7, ids=HOSTILE)
    out = shown(found, capsys)
    for part in (
        "turn-over dropout  2 networks, 10 examples",
        "0.250",
        "0.900",
        "x" * 59 + "…  label 1  2.50",
        "back\\",
    ):
        assert part in out, part
    for suffix in (".png", ".svg"):
        sound(found, tmp_path, suffix, times=2)


def test_turn_over_dropout_of_equal_influence_is_drawn(capsys, tmp_path):
    found = turn_over_of(np.zeros(3))
    assert "suspects" not in shown(found, capsys)
    sound(found, tmp_path)


def test_turn_over_dropout_of_one_example_is_drawn(capsys, tmp_path):
    found = turn_over_of(np.array([1e9]), truth=np.array([True]))
    assert "AUC" in shown(found, capsys)
    sound(found, tmp_path)
