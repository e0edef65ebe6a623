"""Damaged checkpoints of every kind: they open and load, or are refused in one line. Nothing else may happen."""

import random
import shutil
import struct
import warnings
from pathlib import Path

import pytest
import torch

from memdiag.checkpoint import open_checkpoints, save
from memdiag.errors import InputError

FIXTURES = Path(__file__).parent.parent / "fixtures"
N_ROUNDS = 12  # x 30 cases = 360


def truncate(data, rng):
    return data[: rng.randrange(len(data))]


def empty(data, rng):
    return b""


def flip_bit(data, rng, start=0, stop=None):
    position = rng.randrange(start, min(stop or len(data), len(data)))
    return data[:position] + bytes([data[position] ^ (1 << rng.randrange(8))]) + data[position + 1 :]


def flip_in_header(data, rng):
    return flip_bit(data, rng, 0, 8 + int.from_bytes(data[:8], "little"))


def overwrite(data, rng):
    position, n = rng.randrange(len(data)), rng.randrange(1, 40)
    return data[:position] + rng.randbytes(n) + data[position + n :]


def huge_header(data, rng):
    return struct.pack("<Q", rng.choice([2**63, 2**60, 2**40, 10**8, len(data), len(data) - 8])) + data[8:]


def other_number(data, rng):
    """Another number, or another kind of value, where a number stood in a JSON file."""
    digits = [i for i, byte in enumerate(data) if 48 <= byte < 58]
    position = rng.choice(digits)
    new = rng.choice(
        [b"0", b"-1", b"999999999999", b"1e400", b'"a"', b"null", b"[]", b"{}", b"true", b"NaN", b"7" * 5000]
    )
    return data[:position] + new + data[position + 1 :]


def appended(data, rng):
    return data + rng.randbytes(rng.randrange(1, 100))


ANY = (truncate, empty, flip_bit, overwrite, appended)
CASES = [
    *[("llama", "model-00001-of-00003.safetensors", change) for change in (*ANY, flip_in_header, huge_header)],
    *[("llama", "model.safetensors.index.json", change) for change in ANY],
    *[("llama", "config.json", change) for change in (*ANY, other_number)],
    *[("llama", "tokenizer.json", change) for change in (truncate, empty, flip_bit, overwrite, other_number)],
    *[("llama", "tokenizer_config.json", change) for change in (truncate, flip_bit)],
    *[("mlp", "config.json", change) for change in (flip_bit, other_number)],
    *[("pickle", "pytorch_model.bin", change) for change in (truncate, flip_bit, overwrite)],
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Checkpoints to damage, without the bytes that make copying slow."""
    root = tmp_path_factory.mktemp("whole")
    shutil.copytree(FIXTURES / "tiny-llama", root / "llama")
    shutil.copytree(FIXTURES / "digits-mlp", root / "mlp")
    shutil.copytree(FIXTURES / "broken" / "broken-tokenizer", root / "pickle")
    (root / "pickle" / "tokenizer.json").unlink()
    (model,) = open_checkpoints(root / "pickle")
    torch.save(model.load().state_dict(), root / "pickle" / "pytorch_model.bin")
    (root / "pickle" / "model.safetensors").unlink()
    return root


def use(path):
    """Everything that can be done with a checkpoint; the refusals, each of which must be one line."""
    refusals = []
    try:
        checkpoints = open_checkpoints(path)
    except InputError as error:
        return [str(error)]
    for checkpoint in checkpoints:
        for action in (checkpoint.load, checkpoint.tokenizer, checkpoint.fingerprint):
            try:
                action()
            except InputError as error:
                refusals.append(str(error))
    return refusals


@pytest.mark.parametrize(
    ("kind", "name", "change"), CASES, ids=[f"{kind}-{name}-{change.__name__}" for kind, name, change in CASES]
)
def test_damaged_files_are_refused_in_one_line_or_load(whole, tmp_path, kind, name, change):
    rng = random.Random(f"{kind} {name} {change.__name__}")
    directory = tmp_path / kind
    shutil.copytree(whole / kind, directory)
    data = (directory / name).read_bytes()
    for _ in range(N_ROUNDS):
        (directory / name).write_bytes(change(data, rng))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for refusal in use(directory):
                assert "\n" not in refusal
                assert len(refusal) < 1000


def test_the_undamaged_ones_are_not_refused(whole):
    assert {kind: use(whole / kind) for kind in ("llama", "mlp", "pickle")} == {"llama": [], "mlp": [], "pickle": []}


@pytest.mark.parametrize("kind", ["llama", "mlp", "pickle"])
def test_renamed_and_missing_files(whole, tmp_path, kind):
    rng = random.Random(kind)
    names = sorted(file.name for file in (whole / kind).iterdir())
    for i in range(12):
        directory = tmp_path / str(i)
        shutil.copytree(whole / kind, directory)
        name = rng.choice(names)
        if i % 2:
            (directory / name).unlink()
        else:
            (directory / name).replace(directory / rng.choice([*names, "other.json", "other.safetensors"]))
        assert all("\n" not in refusal for refusal in use(directory))


def test_any_bytes_as_a_checkpoint(tmp_path):
    rng = random.Random(0)
    for i in range(30):
        name = rng.choice(["model.safetensors", "pytorch_model.bin", "config.json", "model.safetensors.index.json"])
        directory = tmp_path / str(i)
        directory.mkdir()
        (directory / "config.json").write_text('{"model_type": "gpt2"}')
        (directory / "model.safetensors").write_bytes(b"")
        (directory / name).write_bytes(rng.randbytes(rng.choice([1, 7, 8, 9, 100, 5000])))
        refusals = use(directory)
        assert refusals
        assert all("\n" not in refusal for refusal in refusals)


def test_a_saved_checkpoint_survives_nothing_but_its_own_bytes(tmp_path, whole):
    """Every single truncation of a whole weight file is noticed."""
    (found,) = open_checkpoints(whole / "mlp")
    save(tmp_path / "mlp", found.load())
    file = tmp_path / "mlp" / "model.safetensors"
    data = file.read_bytes()
    for size in range(0, len(data), 97):
        file.write_bytes(data[:size])
        with pytest.raises(InputError, match=r"model\.safetensors"):
            open_checkpoints(tmp_path / "mlp")
