"""memdiag.scores as a package: its names, what it says of each score, ranks, and what holds for all of them."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from memdiag import InputError, scores, tables

B, K, C, E, T, LAYERS = 11, 5, 3, 6, 12, 4  # examples, classes, checkpoints, epochs, tokens, probes
PER_EXAMPLE_FIRST = {  # the axis of the examples is the first one, else it is the last
    "logits", "labels", "gradient_norm", "last_layer_gradient_norm", "input_gradient_norm", "predicted", "logp", "hit",
    "scored", "suffix", "logp_top40", "z", "reference_logp", "zlib_bytes",
}  # fmt: skip
PER_EXAMPLE_LAST = {
    "probes", "gradient_norms", "input_gradient_norms", "input_hessian_traces", "label_logit", "other_logit",
    "logsumexp", "correct",
}  # fmt: skip
FLAGS = {"extractable", "ever_learned", "ez_no_error"}
COUNTS = {
    "prediction_depth", "forgetting_events", "first_learned", "learned_forever", "match_prefix_len", "zlib_len",
}  # fmt: skip


def observations(seed=0, b=B):
    """One array of every kind, at random; some texts have no suffix and the last has no token at all."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, T + 1, b)
    if b > 1:
        lengths[-1] = 0
    scored = np.arange(T) < lengths[:, None]
    suffix = scored & (np.arange(T) >= lengths[:, None] - 4) & (rng.random(b) < 0.8)[:, None]
    labels = rng.integers(0, K, b)
    logits = rng.normal(0, 3, (b, K))
    over_epochs = rng.normal(0, 3, (E, b, K))
    logsumexp = np.log(np.exp(over_epochs).sum(2))
    return {
        "logits": logits,
        "labels": labels,
        "gradient_norm": rng.gamma(2.0, size=b),
        "last_layer_gradient_norm": rng.gamma(2.0, size=b),
        "input_gradient_norm": rng.gamma(2.0, size=b),
        "probes": rng.integers(0, 2, (LAYERS, b)),
        "predicted": rng.integers(0, 2, b),
        "learning_rates": rng.random(C),
        "gradient_norms": rng.gamma(2.0, size=(C, b)),
        "input_gradient_norms": rng.gamma(2.0, size=(C, b)),
        "input_hessian_traces": rng.normal(size=(C, b)),
        "label_logit": over_epochs[:, :, 0],
        "other_logit": over_epochs[:, :, 1:].max(2),
        "logsumexp": logsumexp,
        "correct": rng.random((E, b)) < 0.5,
        "logp": -rng.gamma(1.0, size=(b, T)),
        "hit": rng.random((b, T)) < 0.8,
        "scored": scored,
        "suffix": suffix,
        "logp_top40": np.where(rng.random((b, T)) < 0.05, -np.inf, -rng.gamma(0.5, size=(b, T))),
        "z": rng.normal(size=(b, T)),
        "reference_logp": -rng.gamma(1.5, size=(b, T)),
        "zlib_bytes": np.where(np.arange(b) == 1, np.nan, rng.integers(8, 400, b)),
    }


def of(name, arrays):
    return scores.load(name).score(**{array: arrays[array] for array in scores.needs([name])})


def taken(arrays, rows):
    """The observations of some of the examples, in the order given."""
    first = {name: arrays[name][rows] for name in PER_EXAMPLE_FIRST}
    last = {name: arrays[name][:, rows] for name in PER_EXAMPLE_LAST}
    return first | last | {"learning_rates": arrays["learning_rates"]}


def test_the_names_are_exactly_the_files():
    files = {path.stem for path in Path(scores.__file__).parent.glob("*.py") if not path.stem.startswith("_")}
    assert len(scores.NAMES) == len(set(scores.NAMES))
    assert set(scores.NAMES) == files
    assert scores.NAMES == scores.CLASSIFIER + scores.TRAJECTORY + scores.LANGUAGE + scores.REFERENCE


@pytest.mark.parametrize("name", scores.NAMES)
def test_a_score_says_what_it_is(name):
    module = scores.load(name)
    assert module.NEEDS in ("checkpoint", "gradients", "checkpoints", "trajectory", "reference")
    assert module.MEMORIZED in ("high", "low", None)
    assert module.NULL in ("most", "least", None)
    assert module.RANGE
    assert re.fullmatch(r"arXiv:\d{4}\.\d{5}|openreview:\w{10}", module.SOURCE)
    lines = module.__doc__.splitlines()
    assert lines[0].startswith(f"{name}: ")
    assert 3 <= len(lines) <= 9
    assert module.COLUMN.metadata["nullable"]
    if module.MEMORIZED is not None:
        doc = module.COLUMN.metadata["doc"]
        assert re.search(rf"; {module.MEMORIZED}( \((true|false)\))?: more (memorized|likely seen)", doc), doc


def test_what_a_score_needs_goes_with_its_family():
    assert {scores.load(name).NEEDS for name in scores.CLASSIFIER} == {"checkpoint", "gradients"}
    several = {name for name in scores.TRAJECTORY if scores.load(name).NEEDS == "checkpoints"}
    assert several == {"csg", "tracin_self"}
    assert {scores.load(name).NEEDS for name in scores.TRAJECTORY if name not in several} == {"trajectory"}
    assert {scores.load(name).NEEDS for name in scores.LANGUAGE} == {"checkpoint", "gradients"}
    assert {scores.load(name).NEEDS for name in scores.REFERENCE} == {"reference"}


def test_only_three_scores_have_a_null_that_ranks_last_and_one_that_ranks_first():
    nulls = {name: scores.load(name).NULL for name in scores.NAMES}
    assert {name for name, null in nulls.items() if null == "least"} == {"logp_suffix_top40", "n_at_p50", "n_at_p90"}
    assert {name for name, null in nulls.items() if null == "most"} == {"ez_score"}


@pytest.mark.parametrize(
    ("high", "low"),
    [
        (("loss", "el2n", "csl", "first_learned", "forgetting_events"), ("confidence", "margin", "aum", "correctness")),
        (("em_suffix", "min_k_20", "ref_delta", "extractable"), ("nll_mean", "zlib_ratio", "n_at_p50", "gradnorm")),
    ],
)
def test_orientations_differ_between_what_classifiers_and_language_models_call_memorized(high, low):
    assert {scores.load(name).MEMORIZED for name in high} == {"high"}
    assert {scores.load(name).MEMORIZED for name in low} == {"low"}


def test_an_unknown_score_is_the_users_error_with_the_nearest_name():
    with pytest.raises(InputError, match=r"no score 'el2'; there are .*; did you mean 'el2n'\?"):
        scores.load("el2")
    with pytest.raises(InputError, match="no score '_rows'"):
        scores.load("_rows")
    with pytest.raises(InputError, match="no score 'lost'"):
        scores.columns(["loss", "lost"])


def test_needs_are_the_names_of_the_arrays():
    assert scores.needs([]) == set()
    assert scores.needs(["loss", "csl", "em_full"]) == {"logits", "labels", "label_logit", "logsumexp", "hit", "scored"}
    assert scores.needs(scores.NAMES) == PER_EXAMPLE_FIRST | PER_EXAMPLE_LAST | {"learning_rates"}


def test_columns_make_a_report_and_can_be_used_again():
    columns = scores.columns(["em_full", "extractable", "n_at_p90"])
    assert list(columns) == ["em_full", "extractable", "n_at_p90"]
    for _ in range(2):
        row = dataclasses.make_dataclass("Row", [(name, object, field) for name, field in columns.items()])
        schema = tables.schema_of(row)
        assert schema.names == list(columns)
        assert schema.types == [pa.float64(), pa.bool_(), pa.float64()]
        assert schema.field("n_at_p90").metadata[b"unit"] == b"sample"


def test_types_are_doubles_but_for_flags_and_counts():
    for name in scores.NAMES:
        wanted = pa.bool_() if name in FLAGS else pa.int32() if name in COUNTS else pa.float64()
        assert scores.load(name).COLUMN.metadata["type"] == wanted, name


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from memdiag import scores; scores.columns(scores.NAMES); "
        "print([m for m in ('torch', 'scipy', 'pandas', 'duckdb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_oriented_turns_low_scores_and_leaves_the_rest():
    values, defined = np.array([0.5, -2.0, np.nan]), np.array([True, True, True])
    np.testing.assert_array_equal(scores.oriented("loss", values, defined), values)
    np.testing.assert_array_equal(scores.oriented("margin", values, defined), -values)
    np.testing.assert_array_equal(scores.oriented("zlib_len", values, defined), values)
    np.testing.assert_array_equal(values, [0.5, -2.0, np.nan])


def test_oriented_puts_a_null_at_its_end_only_where_the_example_has_what_is_scored():
    values, defined = np.array([3.0, np.nan, np.nan]), np.array([True, True, False])
    np.testing.assert_array_equal(scores.oriented("n_at_p50", values, defined), [-3.0, -np.inf, np.nan])
    np.testing.assert_array_equal(scores.oriented("logp_suffix_top40", -values, defined), [-3.0, -np.inf, np.nan])
    np.testing.assert_array_equal(scores.oriented("ez_score", values, defined), [3.0, np.inf, np.nan])
    np.testing.assert_array_equal(scores.oriented("ez_no_error", values, defined), [3.0, np.nan, np.nan])
    with pytest.raises(InputError, match="no score"):
        scores.oriented("n_at_p51", values, defined)


@pytest.mark.parametrize("name", scores.NAMES)
def test_neither_the_batch_nor_the_order_matters(name):
    arrays = observations()
    whole = of(name, arrays)
    assert whole.dtype == np.float64
    assert whole.shape == (B,)
    assert np.isfinite(whole).sum() >= 3, "the random examples are no test"
    order = np.random.default_rng(1).permutation(B)
    np.testing.assert_allclose(of(name, taken(arrays, order)), whole[order], rtol=1e-12)
    alone = [of(name, taken(arrays, [i]))[0] for i in range(B)]
    np.testing.assert_allclose(alone, whole, rtol=1e-12)


@pytest.mark.parametrize("name", scores.NAMES)
def test_no_examples_give_no_scores(name):
    none = of(name, taken(observations(), []))
    assert none.shape == (0,)
    assert none.dtype == np.float64


@pytest.mark.parametrize("name", scores.NAMES)
def test_the_observations_are_not_changed(name):
    arrays, before = observations(), observations()
    of(name, arrays)
    for array in scores.needs([name]):
        np.testing.assert_array_equal(arrays[array], before[array])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e200])
@pytest.mark.parametrize("name", scores.NAMES)
def test_what_a_broken_model_gives_is_never_infinite_and_harms_no_other_example(name, value):
    arrays = observations()
    sound = of(name, arrays)
    for array in scores.needs([name]):
        if arrays[array].dtype == np.float64 and array not in ("learning_rates", "zlib_bytes"):
            rows = (slice(0, 2),) if array in PER_EXAMPLE_FIRST else (slice(None), slice(0, 2))
            arrays[array][rows] = value
    broken = of(name, arrays)
    assert not np.isinf(broken).any()
    np.testing.assert_array_equal(broken[2:], sound[2:])


@pytest.mark.parametrize("name", sorted(FLAGS | COUNTS))
def test_flags_and_counts_are_whole_numbers(name):
    values = of(name, observations())
    values = values[~np.isnan(values)]
    assert (values == np.rint(values)).all()
    assert (values >= 0).all()
    if name in FLAGS:
        assert (values <= 1).all()


@pytest.mark.parametrize("name", [*scores.LANGUAGE, *scores.REFERENCE])
def test_a_text_without_a_token_has_no_score_but_what_it_has_without_a_model(name):
    arrays = observations()
    value = of(name, arrays)[-1]
    assert np.isnan(value) == (name not in ("zlib_len", "gradnorm"))
    for array in ("logp", "hit", "scored", "suffix", "logp_top40", "z", "reference_logp"):
        arrays[array] = arrays[array][:, :0]
    if name not in ("zlib_len", "gradnorm"):
        assert np.isnan(of(name, arrays)).all()
