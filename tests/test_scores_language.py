"""Scores of language models: by hand, against the definition, and padding that must never be read."""

from __future__ import annotations

import math

import numpy as np
import pytest

from memdiag import scores
from memdiag.scores.min_k_20 import mean_of_lowest
from memdiag.scores.n_at_p50 import tries
from memdiag.scores.zlib_len import compressed

TEN = [-0.1, -2, -0.5, -4, -0.2, -1, -3, -0.05, -0.3, -0.7]
OF_SUFFIX = (
    "suffix_nll_mean", "em_suffix", "extraction_strength_suffix", "match_prefix_len", "extractable", "logp_suffix_t1",
    "logp_suffix_top40", "n_at_p50", "n_at_p90",
)  # fmt: skip
OF_TEXT = (
    "nll_mean", "nll_sum", "em_full", "extraction_strength", "min_k_20", "min_kpp_20", "zlib_ratio", "ref_delta",
    "ez_score", "ez_no_error",
)  # fmt: skip
PER_TOKEN = ("logp", "logp_top40", "z", "reference_logp")


def row(values, dtype=np.float64):
    return np.array([values], dtype=dtype)


def all_true(like):
    return np.ones(like.shape, dtype=bool)


def on_row(name, values, dtype=np.float64):
    """The score of one text, all of whose tokens count."""
    values = row(values, dtype)
    return scores.load(name).score(values, all_true(values))[0]


def random_texts(seed=0, b=60, t=14, hits=0.8):
    """Texts of 0 to t tokens, with the suffix at the end of some, in an array wider than the longest."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, t + 1, b)
    places = np.arange(t + 3)
    scored = places < lengths[:, None]
    suffix = scored & (places >= lengths[:, None] - 4) & (lengths >= 6)[:, None]
    shape = scored.shape
    return {
        "scored": scored,
        "suffix": suffix,
        "logp": -rng.gamma(1.0, size=shape),
        "logp_top40": np.where(rng.random(shape) < 0.05, -np.inf, -rng.gamma(0.3, size=shape)),
        "z": rng.normal(size=shape),
        "reference_logp": -rng.gamma(1.2, size=shape),
        "hit": rng.random(shape) < hits,
        "zlib_bytes": rng.integers(8, 300, b).astype(float),
        "gradient_norm": rng.gamma(2.0, size=b),
    }


def of(name, texts):
    return scores.load(name).score(**{array: texts[array] for array in scores.needs([name])})


def test_loss_by_hand():
    assert on_row("nll_mean", TEN) == pytest.approx(1.185, abs=1e-9)
    assert on_row("nll_sum", TEN) == pytest.approx(11.85, abs=1e-9)
    assert on_row("suffix_nll_mean", TEN) == pytest.approx(1.185, abs=1e-9)
    assert on_row("logp_suffix_t1", TEN) == pytest.approx(-11.85, abs=1e-9)


@pytest.mark.parametrize(("share", "wanted"), [(0.1, -4), (0.2, -3.5), (0.3, -3.0), (0.5, -2.14), (1.0, -1.185)])
def test_min_k_by_hand(share, wanted):
    values = row(TEN)
    assert mean_of_lowest(values, all_true(values), share)[0] == pytest.approx(wanted, abs=1e-9)
    if share == 0.2:
        assert on_row("min_k_20", TEN) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("length", [1, 2, 4, 5, 9, 10, 14, 15])
def test_min_k_takes_a_fifth_of_the_tokens_and_at_least_one(length):
    values = list(-np.arange(1.0, length + 1))
    m = max(1, length // 5)
    assert on_row("min_k_20", values) == pytest.approx(sum(sorted(values)[:m]) / m)


def test_min_kpp_by_hand():
    dyadic = [0.904534, -0.301511, -1.507557, -1.507557]
    assert on_row("min_kpp_20", dyadic) == pytest.approx(-1.507557)
    assert on_row("min_kpp_20", [1 / 3] * 9 + [-3.0]) == pytest.approx((1 / 3 - 3) / 2)  # two outcomes, p = .9
    assert on_row("min_kpp_20", [0.0] * 7) == 0.0  # all uniform or all certain


def test_min_kpp_is_no_degree_of_memorization():
    # the best of two outcomes with probability p has z = sqrt((1 - p) / p): the surer, the lower
    z = [on_row("min_kpp_20", [math.sqrt((1 - p) / p)] * 10) for p in (0.6, 0.9, 0.99)]
    assert z == pytest.approx([0.816497, 0.333333, 0.100504], abs=1e-6)
    assert z == sorted(z, reverse=True)


@pytest.mark.parametrize(
    ("hits", "wanted"),
    [
        ([1] * 10, 1),
        ([0] * 10, 0),
        ([0] * 9 + [1], 0.1),
        ([1] * 9 + [0], 0),
        ([0, 1, 1, 0, 1, 1, 1, 1, 1, 1], 0.6),
    ],
)
def test_extraction_strength_by_hand(hits, wanted):
    assert on_row("extraction_strength", hits, bool) == pytest.approx(wanted)
    assert on_row("extraction_strength_suffix", hits, bool) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("hits", "length", "whole"), [([1] * 5, 5, 1), ([0] * 5, 0, 0), ([1, 1, 0, 1, 1], 2, 0), ([1, 1, 1, 1, 0], 4, 0)]
)
def test_match_length_and_extractable_by_hand(hits, length, whole):
    assert on_row("match_prefix_len", hits, bool) == length
    assert on_row("extractable", hits, bool) == whole
    assert on_row("ez_no_error", hits, bool) == whole
    assert on_row("em_suffix", hits, bool) == pytest.approx(sum(hits) / 5)


@pytest.mark.parametrize(
    ("p_z", "p", "n"),
    [(0.162, 0.5, 4), (0.162, 0.9, 14), (0.162, 0.999, 40), (1e-3, 0.5, 693), (1e-3, 0.9, 2302), (1e-6, 0.5, 693_147)],
)
def test_samples_needed_by_hand(p_z, p, n):
    log_p = np.array([math.log(p_z)])
    assert tries(log_p, p)[0] == n
    names = {0.5: "n_at_p50", 0.9: "n_at_p90"}
    if p in names:
        assert on_row(names[p], [math.log(p_z) / 4] * 4) == n


def test_a_hundred_samples_of_one_in_a_hundred_by_hand():
    p_at_n = -math.expm1(100 * math.log1p(-0.01))
    assert p_at_n == pytest.approx(0.633968, abs=5e-7)
    assert tries(np.array([math.log(0.01)]), p_at_n - 1e-9)[0] == 100
    assert tries(np.array([math.log(0.01)]), p_at_n + 1e-9)[0] == 101


def test_samples_needed_agree_with_the_definition():
    rng = np.random.default_rng(0)
    p_z = rng.uniform(0.005, 0.999, 300)
    for p in (0.5, 0.9):
        for log_p, n in zip(np.log(p_z), tries(np.log(p_z), p)):
            missed, count = 1.0, 0
            while 1 - missed < p:
                missed *= 1 - math.exp(log_p)
                count += 1
            assert n == count


def test_samples_needed_at_the_ends_of_the_range():
    log_p = np.array([0.0, 1e-9, math.log(0.5), -600.0, -699.9999, -700.0001, -709.0, -710.5, -np.inf, np.nan])
    n = tries(log_p, 0.5)
    np.testing.assert_array_equal(n[:3], [1, 1, 1])  # certain; certain but for rounding; an even coin
    np.testing.assert_allclose(np.log(n[3:7]), math.log(math.log(2)) - log_p[3:7], rtol=1e-12)
    assert np.isnan(n[7:]).all()  # beyond a double; never; unknown
    assert (np.diff(n[2:7]) > 0).all()


def test_rounding_does_not_cost_one_more_sample():
    n = np.arange(1, 500)
    for p in (0.5, 0.9):
        enough = -np.expm1(np.log1p(-p) / n)  # p_z for which n samples reach p exactly
        np.testing.assert_array_equal(tries(np.log(enough), p), n)


def test_sampling_among_the_best_two_by_hand():
    # q = (1/2, 1/4, 1/8, 1/8) among the best two: token 1 has log(1/3), token 2 is out
    assert on_row("logp_suffix_top40", [math.log(1 / 3)]) == pytest.approx(-1.098612, abs=5e-7)
    assert on_row("n_at_p50", [math.log(1 / 3)]) == 2
    for name in ("logp_suffix_top40", "n_at_p50", "n_at_p90"):
        impossible = on_row(name, [math.log(1 / 3), -np.inf])
        assert np.isnan(impossible)
        assert scores.oriented(name, row(impossible)[0], np.array([True])) == [-np.inf]


@pytest.mark.parametrize(
    ("text", "length"),
    [("", 8), ("a", 9), ("abc" * 10, 13), ("The quick brown fox jumps over the lazy dog", 50)],
)
def test_compressed_lengths_by_hand(text, length):
    assert compressed(text) == length  # of the zlib that CPython is built with; others may differ by a byte
    np.testing.assert_array_equal(scores.load("zlib_len").score(np.array([length, np.nan])), [length, np.nan])


def test_compression_never_fails_on_text():
    assert compressed("\ud800 é 漢") > 8
    assert compressed("x" * 1000) < compressed("".join(map(chr, range(1000))))


def test_zlib_ratio_by_hand():
    ratio = scores.load("zlib_ratio").score(row(TEN), all_true(row(TEN)), np.array([50.0]))
    assert ratio[0] == pytest.approx(11.85 / 50)
    assert np.isnan(scores.load("zlib_ratio").score(row(TEN), all_true(row(TEN)), np.array([np.nan]))).all()


def test_error_zone_by_hand():
    delta, hit = row([0.5, -0.2, 1, -0.3, 2]), row([False, False, True, False, False], bool)
    reference = row([-3.0, -2, -4, -1, -5])
    ez = scores.load("ez_score").score(reference + delta, reference, hit, all_true(hit))
    assert ez[0] == pytest.approx(0.847298, abs=5e-7)  # P = 2.5 and N = .5


def test_a_text_without_an_error_has_no_error_zone_and_says_so():
    texts = random_texts(hits=1.1)
    some = texts["scored"].any(1)
    ez, flag = of("ez_score", texts), of("ez_no_error", texts)
    assert np.isnan(ez).all()
    np.testing.assert_array_equal(flag, np.where(some, 1, np.nan))
    np.testing.assert_array_equal(scores.oriented("ez_score", ez, some), np.where(some, np.inf, np.nan))


def test_a_reference_that_is_the_model_itself_shows_nothing():
    texts = random_texts()
    texts["reference_logp"] = texts["logp"]
    for name in ("ref_delta", "ez_score"):
        values = of(name, texts)
        assert (values[~np.isnan(values)] == 0).all()
        assert (~np.isnan(values)).sum() > 30


def test_model_and_reference_swapped_turn_the_sign():
    texts = random_texts()
    swapped = texts | {"logp": texts["reference_logp"], "reference_logp": texts["logp"]}
    for name in ("ref_delta", "ez_score"):
        np.testing.assert_allclose(of(name, swapped), -of(name, texts), rtol=1e-12)


def test_gradnorm_is_passed_on_and_undefined_where_not_finite():
    norms = np.array([0.0, 1.5, np.inf, np.nan])
    np.testing.assert_array_equal(scores.load("gradnorm").score(norms), [0.0, 1.5, np.nan, np.nan])


def _by_definition(text, suffix):
    """Every score of one text from the lists of what counts, by plain loops; None where undefined."""
    out = dict.fromkeys((*OF_TEXT, *OF_SUFFIX))
    n = len(text["logp"])
    if n:
        lowest = max(1, n // 5)
        errors = [t for t in range(n) if not text["hit"][t]]
        shifts = [text["logp"][t] - text["reference_logp"][t] for t in errors]
        out |= {
            "nll_mean": -sum(text["logp"]) / n,
            "nll_sum": -sum(text["logp"]),
            "em_full": sum(text["hit"]) / n,
            "extraction_strength": 1 - next(k for k in range(n + 1) if all(text["hit"][k:])) / n,
            "min_k_20": sum(sorted(text["logp"])[:lowest]) / lowest,
            "min_kpp_20": sum(sorted(text["z"])[:lowest]) / lowest,
            "zlib_ratio": -sum(text["logp"]) / text["zlib_bytes"],
            "ref_delta": sum(a - b for a, b in zip(text["logp"], text["reference_logp"])) / n,
            "ez_no_error": float(not errors),
        }
        if errors:
            up, down = sum(d for d in shifts if d > 0), sum(-d for d in shifts if d < 0)
            out["ez_score"] = math.log((up + 1) / (down + 1))
    s = len(suffix["logp"])
    if s:
        emitted = 0
        while emitted < s and suffix["hit"][emitted]:  # greedy decoding, until it leaves the text
            emitted += 1
        out |= {
            "suffix_nll_mean": -sum(suffix["logp"]) / s,
            "em_suffix": sum(suffix["hit"]) / s,
            "extraction_strength_suffix": 1 - next(k for k in range(s + 1) if all(suffix["hit"][k:])) / s,
            "match_prefix_len": emitted,
            "extractable": float(emitted == s),
            "logp_suffix_t1": sum(suffix["logp"]),
        }
        log_p = sum(suffix["logp_top40"])
        if log_p > -math.inf:
            rate = math.log1p(-math.exp(log_p))
            out["logp_suffix_top40"] = log_p
            out["n_at_p50"], out["n_at_p90"] = (math.ceil(math.log1p(-p) / rate) for p in (0.5, 0.9))
    return out


@pytest.mark.parametrize("hits", [0.5, 0.95])
def test_all_agree_with_the_definitions(hits):
    texts = random_texts(seed=3, b=200, hits=hits)
    values = {name: of(name, texts) for name in (*OF_TEXT, *OF_SUFFIX)}
    for i in range(200):
        text = {name: list(texts[name][i][texts["scored"][i]]) for name in (*PER_TOKEN, "hit")}
        suffix = {name: list(texts[name][i][texts["suffix"][i]]) for name in (*PER_TOKEN, "hit")}
        wanted = _by_definition(text | {"zlib_bytes": texts["zlib_bytes"][i]}, suffix)
        for name, value in wanted.items():
            if value is None:
                assert math.isnan(values[name][i]), name
            else:
                assert values[name][i] == pytest.approx(value, rel=1e-10, abs=1e-12), name
    for name, column in values.items():
        assert (~np.isnan(column)).sum() > 20, f"{name}: the random texts are no test"


@pytest.mark.parametrize("poison", [np.nan, 1e9, -np.inf, np.inf])
@pytest.mark.parametrize("name", [*OF_TEXT, *OF_SUFFIX])
def test_what_the_masks_leave_out_is_never_read(name, poison):
    texts = random_texts(seed=1)
    mask = texts["suffix"] if name in OF_SUFFIX else texts["scored"]
    poisoned = texts | {array: np.where(mask, texts[array], poison) for array in PER_TOKEN}
    for garbage in (True, False):
        poisoned["hit"] = np.where(mask, texts["hit"], garbage)
        np.testing.assert_array_equal(of(name, poisoned), of(name, texts))


@pytest.mark.parametrize("name", [*OF_TEXT, *OF_SUFFIX])
def test_more_padding_on_either_side_changes_nothing(name):
    texts = random_texts(seed=2)
    padded = {
        array: np.pad(values, ((0, 0), (5, 7)), constant_values=False if values.dtype == bool else np.nan)
        for array, values in texts.items()
        if values.ndim == 2
    }
    np.testing.assert_allclose(of(name, texts | padded), of(name, texts), rtol=1e-12)


@pytest.mark.parametrize("name", [*OF_TEXT, *OF_SUFFIX])
def test_a_text_all_of_which_is_masked_has_no_score(name):
    texts = random_texts()
    nothing = np.zeros_like(texts["scored"])
    assert np.isnan(of(name, texts | {"scored": nothing, "suffix": nothing})).all()


@pytest.mark.parametrize("name", OF_SUFFIX)
def test_a_text_too_short_for_a_suffix_has_no_suffix_score(name):
    texts = random_texts()
    none = ~texts["suffix"].any(1)
    assert 5 < none.sum() < 55
    values = of(name, texts)
    assert np.isnan(values[none]).all()
    limited = scores.oriented(name, values, texts["suffix"].any(1))
    assert np.isnan(limited[none]).all()


@pytest.mark.parametrize("name", ["nll_mean", "min_k_20", "min_kpp_20", "logp_suffix_t1", "ref_delta", "ez_score"])
def test_a_token_without_a_number_makes_its_text_undefined(name):
    texts = random_texts(hits=0.0)
    i = int(np.flatnonzero(texts["suffix"].any(1))[0])
    place = np.flatnonzero(texts["suffix"][i])[1]
    for array in ("logp", "z"):
        texts[array][i, place] = np.nan
    values = of(name, texts)
    assert np.isnan(values[i])
    assert (~np.isnan(values)).sum() > 20


def test_a_text_known_for_certain_costs_zero_and_not_minus_zero():
    for name in ("nll_mean", "nll_sum", "suffix_nll_mean"):
        assert math.copysign(1, on_row(name, [0.0, 0.0])) == 1


def test_the_measures_of_extraction_agree_with_each_other():
    texts = random_texts(seed=5, b=400, hits=0.85)
    has = texts["suffix"].any(1)
    value = {name: of(name, texts)[has] for name in (*OF_SUFFIX, "em_full", "extraction_strength", "ez_no_error")}
    whole = value["extractable"] == 1
    assert 20 < whole.sum() < has.sum() - 20
    np.testing.assert_array_equal(value["em_suffix"] == 1, whole)
    np.testing.assert_array_equal(value["extraction_strength_suffix"] == 1, whole)
    np.testing.assert_array_equal(value["match_prefix_len"] == 4, whole)
    assert (value["match_prefix_len"] / 4 <= value["em_suffix"]).all()
    assert (value["extraction_strength"] <= value["em_full"]).all()
    np.testing.assert_array_equal(value["extraction_strength"] == 1, value["ez_no_error"] == 1)
    known = ~np.isnan(value["n_at_p50"])
    np.testing.assert_array_equal(known, ~np.isnan(value["logp_suffix_top40"]))
    assert (value["n_at_p50"][known] <= value["n_at_p90"][known]).all()


def test_sampling_among_the_best_forty_is_never_less_likely():
    rng = np.random.default_rng(0)
    logits, tokens, suffix = rng.normal(0, 2, (30, 8, 100)), rng.integers(0, 100, (30, 8)), np.ones((30, 8), dtype=bool)
    tokens = np.where(rng.random((30, 8)) < 0.97, logits.argmax(2), tokens)
    threshold = np.sort(logits, axis=2)[:, :, -40]
    mine = np.take_along_axis(logits, tokens[:, :, None], 2)[:, :, 0]
    logp = mine - np.log(np.exp(logits).sum(2))
    kept = np.where(logits >= threshold[:, :, None], np.exp(logits), 0).sum(2)
    logp_top40 = np.where(mine >= threshold, mine - np.log(kept), -np.inf)
    t1, top = (
        scores.load("logp_suffix_t1").score(logp, suffix),
        scores.load("logp_suffix_top40").score(logp_top40, suffix),
    )
    finite = ~np.isnan(top)
    assert 10 < finite.sum() < 30
    assert (t1[finite] <= top[finite]).all()


def test_a_longer_way_to_the_suffix_does_not_change_its_scores():
    texts = random_texts(seed=7)
    longer = {name: np.concatenate([values[:, ::-1], values], 1) for name, values in texts.items() if values.ndim == 2}
    longer["suffix"] = np.concatenate([np.zeros_like(texts["suffix"]), texts["suffix"]], 1)
    for name in OF_SUFFIX:
        np.testing.assert_allclose(of(name, longer), of(name, texts), rtol=1e-12)
