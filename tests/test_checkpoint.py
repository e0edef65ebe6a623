import json
import os
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from memdiag import checkpoint
from memdiag.checkpoint import inner_steps, open_checkpoints, pad_id, save
from memdiag.errors import InputError
from memdiag.models.mlp import MLP, MlpConfig

FIXTURES = Path(__file__).parent.parent / "fixtures"
BROKEN = FIXTURES / "broken"

FACTORIES = """
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

def tied(): return Tied()
def linear(): return nn.Linear(3, 2)
def wrapped(): return nn.ModuleDict({"module": nn.Linear(3, 2)})
def failing(): raise KeyError("no\\nsuch setting")
def number(): return 7
value = 3
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """A working directory whose `ckpt_factories.py` is the user's own code."""
    (tmp_path / "ckpt_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "ckpt_factories", raising=False)
    return tmp_path


def one(path, **options):
    (found,) = open_checkpoints(path, **options)
    return found


def refused(path, says, **options):
    """The one line with which opening or loading is refused; it must hold `says`."""
    with pytest.raises(InputError) as caught:
        one(path, **options).load()
    message = str(caught.value)
    assert says in message
    assert "\n" not in message
    return message


def copied(name, to):
    shutil.copytree(FIXTURES / name, to)
    return to


def content(tensor):
    return tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes()


def edit_config(directory, **settings):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


# -- what opens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "class_name", "dtype", "task"),
    [
        ("tiny-gpt2", "huggingface", "GPT2LMHeadModel", torch.float32, None),
        ("tiny-llama", "huggingface", "LlamaForCausalLM", torch.bfloat16, None),
        ("tiny-bert", "huggingface", "BertModel", torch.float32, None),
        ("tiny-vit", "huggingface", "ViTForImageClassification", torch.float32, "task:digits?shape=image"),
        ("digits-mlp", "memdiag", "MLP", torch.float32, "task:digits"),
    ],
)
def test_every_kind_opens_with_exactly_its_weights(name, kind, class_name, dtype, task):
    found = one(FIXTURES / name)
    assert (found.kind, found.name, found.step, found.task) == (kind, name, None, task)
    model = found.load()
    assert type(model).__name__ == class_name
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    stored = {key: tensor for file in found.files() for key, tensor in load_file(file).items()}
    # By content, since transformers keeps some older names in files; a set, since tied tensors are stored once.
    assert {content(tensor) for tensor in model.state_dict().values()} == {content(t) for t in stored.values()}


def test_loading_agrees_with_transformers_own_loading():
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(FIXTURES / "tiny-llama", local_files_only=True)
    tokens = torch.arange(40).reshape(2, 20)
    assert torch.equal(one(FIXTURES / "tiny-llama").load()(tokens).logits, theirs(tokens).logits)


def test_tied_weights_stay_tied():
    model = one(FIXTURES / "tiny-gpt2").load()
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", ["tiny-llama", "digits-mlp"])
def test_dtype_can_be_chosen(name, dtype):
    model = one(FIXTURES / name).load(dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_unknown_dtype_and_device_are_named():
    with pytest.raises(InputError, match=r"no dtype 'floot32'.*did you mean 'float32'"):
        one(FIXTURES / "digits-mlp").load(dtype="floot32")
    with pytest.raises(InputError, match="device 'cupboard'"):
        one(FIXTURES / "digits-mlp").load(device="cupboard")


def test_float16_overflow_is_refused_rather_than_measured(tmp_path):
    model = MLP(MlpConfig((3, 2)))
    with torch.no_grad():
        model.layers.linear_1.weight[0, 0] = 1e6
    save(tmp_path / "big", model)
    assert one(tmp_path / "big").load() is not None
    with pytest.raises(InputError, match=r"linear_1\.weight' holds an infinity \(as float16\)"):
        one(tmp_path / "big").load(dtype="float16")


def test_nothing_reaches_for_the_network_or_writes_to_stderr(monkeypatch, capfd):
    def never(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", never)
    for name in ("tiny-gpt2", "tiny-llama", "tiny-bert", "tiny-vit"):
        one(FIXTURES / name).load()
        one(FIXTURES / name).tokenizer()
    assert capfd.readouterr().err == ""


def test_unused_weights_are_a_one_line_warning(tmp_path):
    directory = copied("tiny-bert", tmp_path / "bert")
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {"cls.odd.weight": torch.zeros(2)}, directory / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=r"not used by the model: 'cls\.odd\.weight'"):
        one(directory).load()


def test_an_architecture_transformers_lacks_falls_back_to_its_base_model(tmp_path):
    edit_config(copied("tiny-bert", tmp_path / "bert"), architectures=["MyOwnBert"])
    assert type(one(tmp_path / "bert").load()).__name__ == "BertModel"


def test_config_cannot_choose_kernels_or_other_files(tmp_path):
    directory = copied("tiny-gpt2", tmp_path / "gpt2")
    edit_config(
        directory, attn_implementation="some/kernel", _attn_implementation="some/kernel", transformers_weights="../x"
    )
    assert one(directory).load().config._attn_implementation == "sdpa"


def test_pytorch_bin_directory(tmp_path):
    directory = copied("tiny-gpt2", tmp_path / "gpt2")
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    whole = one(directory)
    expected, fingerprint = whole.load().state_dict(), whole.fingerprint()
    (directory / "model.safetensors").unlink()
    found = one(directory)
    assert found.files() == [directory / "pytorch_model.bin"]
    assert found.fingerprint() == fingerprint
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.load().state_dict().items())


def test_sharded_pytorch_bin_directory(tmp_path):
    directory = copied("tiny-llama", tmp_path / "llama")
    fingerprint = one(directory).fingerprint()
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    for shard in set(index["weight_map"].values()):
        torch.save(load_file(directory / shard), directory / shard.replace(".safetensors", ".bin"))
        (directory / shard).unlink()
    (directory / "model.safetensors.index.json").unlink()
    index["weight_map"] = {key: shard.replace(".safetensors", ".bin") for key, shard in index["weight_map"].items()}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert one(directory).fingerprint() == fingerprint
    assert next(one(directory).load().parameters()).dtype == torch.bfloat16


# -- fingerprints --------------------------------------------------------------------------------------------------


def test_fingerprint_does_not_depend_on_path_time_or_sharding(tmp_path):
    sharded = one(FIXTURES / "tiny-llama")
    moved = copied("tiny-llama", tmp_path / "elsewhere")
    tensors = {key: tensor for file in sharded.files() for key, tensor in load_file(file).items()}
    for file in one(moved).files():
        file.unlink()
    (moved / "model.safetensors.index.json").unlink()
    save_file(dict(reversed(tensors.items())), moved / "model.safetensors", {"format": "pt"})
    os.utime(moved / "config.json", (0, 0))
    assert len(sharded.files()) >= 2
    assert one(moved).fingerprint() == sharded.fingerprint()


def test_fingerprint_of_a_state_dict_does_not_depend_on_its_format(tmp_path):
    tensors = {
        "a": torch.randn(3, 4).bfloat16(),
        "b": torch.arange(5),
        "c": torch.tensor(2.5, dtype=torch.float64),
        "d": torch.tensor([True, False]),
        "e": torch.randn(4, 3).t().half(),  # not contiguous
        "f": torch.zeros(0, 3),
        "g": torch.randn(3, dtype=torch.complex64),
    }
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "w.safetensors")
    torch.save(tensors, tmp_path / "zip.pt")
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)
    torch.save({f"module._orig_mod.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "wrapped.pth")
    prints = {one(file, model="math:sin").fingerprint() for file in tmp_path.iterdir()}
    assert len(prints) == 1


def test_fingerprint_of_float8(tmp_path):
    tensors = {f"t{i}": torch.ones(3).to(dt) for i, dt in enumerate([torch.float8_e4m3fn, torch.float8_e5m2])}
    save_file(tensors, tmp_path / "w.safetensors")
    torch.save(tensors, tmp_path / "w.pt")
    assert len({one(file, model="math:sin").fingerprint() for file in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("change", ["bit", "name", "shape", "dtype", "config"])
def test_fingerprint_changes_with_what_it_covers(tmp_path, change):
    directory = copied("digits-mlp", tmp_path / "mlp")
    before = one(directory).fingerprint()
    tensors = load_file(directory / "model.safetensors")
    first = "layers.linear_1.weight"
    if change == "bit":
        tensors[first].view(torch.int32)[0, 0] ^= 1
    elif change == "name":
        tensors["layers.linear_0.weight"] = tensors.pop(first)
    elif change == "shape":
        tensors[first] = tensors[first].reshape(64, 32)
    elif change == "dtype":
        tensors[first] = tensors[first].view(torch.int32)
    else:
        edit_config(directory, activation="gelu")
    save_file(tensors, directory / "model.safetensors")
    assert one(directory).fingerprint() != before


def test_fingerprint_ignores_how_the_config_was_saved(tmp_path):
    directory = copied("tiny-gpt2", tmp_path / "gpt2")
    before = one(directory).fingerprint()
    edit_config(directory, transformers_version="4.0.0", _name_or_path="/home/me", torch_dtype="float16", dtype=None)
    assert one(directory).fingerprint() == before


# -- runs ----------------------------------------------------------------------------------------------------------


def test_a_run_opens_in_step_order():
    run = open_checkpoints(FIXTURES / "run")
    assert [c.step for c in run] == [0, 50, 100, 200, 400, 800]  # not by name: 100 before 50
    assert {c.task for c in run} == {"task:pydoc"}
    assert len({c.fingerprint() for c in run}) == 6
    assert inner_steps(FIXTURES / "run") == [0, 50, 100, 200, 400, 800]
    assert inner_steps(FIXTURES / "tiny-gpt2") == []


@pytest.mark.parametrize(
    ("steps", "chosen"),
    [
        ("100", [100]),
        ("400,0", [0, 400]),
        (":", [0, 50, 100, 200, 400, 800]),
        ("100:400", [100, 200, 400]),
        (":100", [0, 50, 100]),
        ("200:", [200, 400, 800]),
        ("0:800:200", [0, 200, 400, 800]),
        ("::100", [0, 100, 200, 400, 800]),
        ("50::150", [50, 200, 800]),
        ("0, 50 ,100", [0, 50, 100]),
        ("50,50:50,400:", [50, 400, 800]),
    ],
)
def test_steps_are_numbers_and_the_stop_is_included(steps, chosen):
    assert [c.step for c in open_checkpoints(FIXTURES / "run", steps=steps)] == chosen


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ("300", "no step 300; there are 0, 50, 100, 200, 400, 800"),
        ("0,300", "no step 300"),
        ("201:399", "choose none; there are 0, 50"),
        ("0:800:0", "stride must be at least 1"),
        ("-50", "wanted a list"),
        ("a", "wanted a list"),
        ("", "wanted a list"),
        ("0,", "wanted a list"),
        ("1:2:3:4", "wanted a list"),
        ("1.5", "wanted a list"),
        ("9" * 30, "wanted a list"),
    ],
)
def test_steps_that_choose_nothing_are_named(steps, says):
    with pytest.raises(InputError, match=says):
        open_checkpoints(FIXTURES / "run", steps=steps)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        *[("checkpoint-500", 500), ("step_500", 500), ("step500", 500), ("step-500", 500), ("500", 500)],
        *[("000500", 500), ("global_step500", 500), ("checkpoint-step-500", 500), ("ckpt_7", 7), ("Step_3.pt", 3)],
        *[("step_500.safetensors", 500), ("logs", None), ("tmp-checkpoint-500", None), ("checkpoint", None)],
        *[("checkpoint-500.partial", None), ("run1", None), ("v2", None), ("step_500.json", None)],
    ],
)
def test_steps_in_names(name, step):
    assert checkpoint._steps.step_of(Path(name)) == step


def mlp_run(path, *steps):
    for step in steps:
        save(path / f"step_{step}", MLP(MlpConfig((2, 2))))
    return path


def test_children_without_a_step_are_ignored(tmp_path):
    run = mlp_run(tmp_path / "run", 0, 5)
    (run / "logs").mkdir()
    (run / "notes.txt").write_text("7")
    (run / "10").write_text("a file, not weights")
    save(run / "best", MLP(MlpConfig((2, 2))))
    assert [c.step for c in open_checkpoints(run)] == [0, 5]


def test_an_incomplete_child_is_named_unless_left_out(tmp_path):
    run = mlp_run(tmp_path / "run", 0, 5, 7)
    (run / "step_9").mkdir()
    with pytest.raises(InputError, match=r"step_9: is empty.*leave it out with --steps"):
        open_checkpoints(run)
    assert [c.step for c in open_checkpoints(run, steps=":8")] == [0, 5, 7]
    weights = run / "step_7" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"step_7.model.safetensors: cut off.*leave it out with --steps"):
        open_checkpoints(run, steps="0:8")
    assert [c.step for c in open_checkpoints(run, steps=":5")] == [0, 5]


def test_two_children_of_one_step_are_named(tmp_path):
    run = mlp_run(tmp_path / "run", 0, 5)
    shutil.copytree(run / "step_5", run / "checkpoint-5")
    with pytest.raises(InputError, match="checkpoint-5 and step_5 are both step 5"):
        open_checkpoints(run)
    assert [c.step for c in open_checkpoints(run, steps="0")] == [0]


def test_a_checkpoint_with_its_run_inside_is_the_checkpoint_unless_steps_are_given(tmp_path):
    root = copied("digits-mlp", tmp_path / "final")
    mlp_run(root, 10, 20)
    assert [c.path for c in open_checkpoints(root)] == [root]
    assert inner_steps(root) == [10, 20]
    assert [c.step for c in open_checkpoints(root, steps="10:")] == [10, 20]


def test_one_checkpoint_has_no_steps_to_choose():
    refused(FIXTURES / "digits-mlp", "is one checkpoint", steps="0:10")
    refused(FIXTURES / "digits-mlp" / "model.safetensors", "is one file", steps="0")


def test_a_run_of_state_dict_files(factories):
    for step in (20, 3):
        save_file(nn.Linear(3, 2).state_dict(), factories / f"step_{step}.safetensors")
    torch.save(nn.Linear(3, 2).state_dict(), factories / "step_100.pt")
    run = open_checkpoints(factories, model="ckpt_factories:linear")
    assert [(c.step, c.kind) for c in run] == [(3, "state_dict"), (20, "state_dict"), (100, "state_dict")]
    assert all(isinstance(c.load(), nn.Linear) for c in run)
    with pytest.raises(InputError, match="a state dict needs its model"):
        open_checkpoints(factories)


def test_the_name_is_that_of_the_path_even_for_a_dot(monkeypatch):
    monkeypatch.chdir(FIXTURES / "run" / "checkpoint-50")
    assert (one(".").name, one(".").step) == ("checkpoint-50", 50)
    assert one(".").tokenizer() is not None  # the run's, beside it


# -- state dicts and factories -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 1},
        lambda s: {"model": s},
        lambda s: {"model_state_dict": s, "step": 5},
        lambda s: {f"module.{key}": tensor for key, tensor in s.items()},
        lambda s: {"state_dict": {f"_orig_mod.module.{key}": tensor for key, tensor in s.items()}},
    ],
)
@pytest.mark.parametrize("factory", ["linear", "wrapped"])
def test_state_dict_wrappers_and_prefixes(factories, wrap, factory):
    state = nn.Linear(3, 2).state_dict()
    torch.save(wrap(state), factories / "w.pt")
    own = one(factories / "w.pt", model=f"ckpt_factories:{factory}").load().state_dict()
    prefix = "module." if factory == "wrapped" else ""
    assert all(torch.equal(own[prefix + key], tensor) for key, tensor in state.items())


def test_state_dict_keeps_its_dtype(factories):
    save_file(nn.Linear(3, 2).bfloat16().state_dict(), factories / "w.safetensors")
    found = one(factories / "w.safetensors", model="ckpt_factories:linear")
    assert found.load().weight.dtype == torch.bfloat16
    assert found.load(dtype="float64").weight.dtype == torch.float64


def test_tied_weights_may_be_stored_once_or_twice_but_must_agree(factories):
    weight = torch.randn(5, 3)
    for stored in ({"embed.weight": weight}, {"head.weight": weight}, {"embed.weight": weight, "head.weight": weight}):
        torch.save(stored, factories / "w.pt")
        model = one(factories / "w.pt", model="ckpt_factories:tied").load()
        assert torch.equal(model.embed.weight, weight)
        assert model.head.weight is model.embed.weight
    torch.save({"embed.weight": weight, "head.weight": weight + 1}, factories / "w.pt")
    refused(factories / "w.pt", "one parameter in the model but differ", model="ckpt_factories:tied")


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"weight": torch.zeros(2, 3)}, "missing: 'bias'"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "odd": torch.zeros(1)}, "unexpected: 'odd'"),
        ({"w": torch.zeros(2, 3), "b": torch.zeros(2)}, "missing: 'bias', 'weight'; unexpected: 'b', 'w'"),
        (
            {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)},
            "tensor 'weight' has shape [2, 4], the model wants [2, 3]",
        ),
        ({"weight": torch.zeros(2, 3), "bias": torch.tensor([1.0, float("nan")])}, "'bias' holds 1 NaN among its 2"),
        ({"weight": torch.zeros(2, 3), "bias": 3.0}, "'bias' is a float"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2).to_sparse()}, "not a plain dense tensor"),
        ({"weight": torch.zeros(1).expand(2, 3), "bias": torch.zeros(2)}, "expanded view"),
        ({"a\nb": torch.zeros(1)}, "unexpected: 'a\\\\nb'"),
        ({3: torch.zeros(1)}, "'3' is a Tensor"),
        ({}, "holds no tensors"),
        ([torch.zeros(1)], "holds a list"),
        (torch.zeros(3), "holds a Tensor"),
    ],
)
def test_state_dicts_that_do_not_fit_are_named(factories, state, says):
    torch.save(state, factories / "w.pt")
    refused(factories / "w.pt", says.replace("\\\\", "\\"), model="ckpt_factories:linear")


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        ("ckpt_factories:failing", "ckpt_factories:failing failed: KeyError"),
        ("ckpt_factories:number", "returned a int"),
        ("ckpt_factories:value", "is a int, wanted a function"),
        ("ckpt_factories:absent", "cannot be imported"),
        ("no_such_module_here:make", "cannot be imported: ModuleNotFoundError"),
        ("ckpt_factories", "wanted package.module:factory"),
        (":linear", "wanted package.module:factory"),
    ],
)
def test_factories_that_fail_are_named(factories, factory, says):
    save_file(nn.Linear(3, 2).state_dict(), factories / "w.safetensors")
    refused(factories / "w.safetensors", says, model=factory)


def test_a_directorys_weights_can_go_into_the_users_own_model(factories):
    found = one(BROKEN / "remote-code", model="ckpt_factories:linear")
    with pytest.raises(InputError, match="its tensors are not those of the model"):
        found.load()
    directory = factories / "only-weights"
    save(directory, nn.Linear(3, 2))
    assert sorted(file.name for file in directory.iterdir()) == ["model.safetensors"]
    assert isinstance(one(directory, model="ckpt_factories:linear").load(), nn.Linear)
    refused(directory, "no config.json")


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("not-a-checkpoint", "not a checkpoint, holds notes.txt; memdiag opens a directory with config.json"),
        ("no-weights", "has config.json but no weights"),
        ("truncated", "cut off, 3,112 bytes found and 4,112 wanted"),
        ("huge-header", "its header claims 1,152,921,504,606,846,976 bytes of a file of 4,112"),
        ("corrupt-header", "header is damaged"),
        ("missing-shard", "shard model-00002-of-00002.safetensors is missing (1 of 2 are there)"),
        ("pickled", "pytorch_model.bin: holds pickled code (print)"),
        ("remote-code", "code shipped with the checkpoint"),
        ("unknown-model", "'gpt-from-the-future', which transformers"),
        ("shape-mismatch", "'transformer.h.0.mlp.c_fc.weight' has shape [8, 16], config.json wants [8, 8]"),
        ("missing-keys", "lack 'transformer.h.0.mlp.c_fc.weight'"),
        ("nan", "'transformer.h.0.mlp.c_fc.weight' holds 1 NaN among its 64"),
        ("bad-json", "config.json: not JSON"),
        ("absurd-config", "config.json has n_embd 1e+09"),
    ],
)
def test_broken_checkpoints_are_refused_in_one_line(name, says, capfd):
    message = refused(BROKEN / name, says)
    assert str(BROKEN / name) in message
    output = capfd.readouterr()
    assert output.out == output.err == ""  # above all not "pickled code ran"


def test_every_broken_fixture_has_a_test():
    (mark,) = test_broken_checkpoints_are_refused_in_one_line.pytestmark
    assert {name for name, _ in mark.args[1]} | {"broken-tokenizer"} == {p.name for p in BROKEN.iterdir()}


@pytest.mark.parametrize("name", ["weights.pt", "legacy.pt"])
def test_pickled_code_is_never_run(name, capfd):
    refused(BROKEN / "pickled" / name, "holds pickled code (print)", model="math:sin")
    output = capfd.readouterr()
    assert output.out == output.err == ""


def test_paths_that_are_no_checkpoint(tmp_path):
    refused(FIXTURES / "tiny-gpt", f"no such path; did you mean {FIXTURES / 'tiny-gpt2'}?")
    refused(tmp_path / "a" / "b", "no such path (nor")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is empty; memdiag opens")
    refused(FIXTURES / "texts.jsonl", "not a checkpoint; memdiag opens")
    refused(FIXTURES / "tiny-gpt2" / "model.safetensors", "or open its directory")
    refused(FIXTURES, "not a checkpoint, holds broken, digits-mlp")


def test_adapters_are_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    refused(tmp_path, "is an adapter; merge it into its base model")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model_type": None}, "no model_type"),
        ({"model_type": ["gpt2"]}, "no model_type"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "encoder-decoder"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"architectures": ["BertModel"]}, "architecture 'BertModel' does not go with model_type 'gpt2'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"n_embd": "a"}, "config.json makes no model"),
        ({"n_embd": -8}, "config.json"),
        ({"n_layer": 10**8}, "n_layer 1e+08"),
        ({"n_layer": 2}, "lack 'transformer.h.1."),
        ({"n_embd": 4096, "n_inner": 4096}, "has shape"),
        ({"n_positions": 2**20, "n_embd": 1024}, "asks for"),
        ({"num_labels": 10**9}, "num_labels 1e+09"),
        ({"vocab_size": 17}, "'transformer.wte.weight' has shape [16, 8], config.json wants [17, 8]"),
        ({"activation_function": "no-such"}, "config.json makes no model"),
    ],
)
def test_configs_that_do_not_fit_are_refused(tmp_path, settings, says):
    directory = tmp_path / "broken"
    shutil.copytree(BROKEN / "broken-tokenizer", directory)  # whole, but for its tokenizer
    assert one(directory).load() is not None
    edit_config(directory, **settings)
    refused(directory, says)


@pytest.mark.parametrize("content", ["", "[]", "3", "null", "[" * 100_000, '{"model_type": "gpt2"', "\xff"])
def test_config_that_is_no_json_object(tmp_path, content):
    directory = copied("digits-mlp", tmp_path / "mlp")
    (directory / "config.json").write_bytes(content.encode("latin-1"))
    refused(directory, "config.json")


@pytest.mark.parametrize("settings", [{"widths": [64, 32, 32, 11]}, {"widths": [2**30, 2**30]}, {"widths": "x"}])
def test_memdiag_config_that_does_not_fit(tmp_path, settings):
    edit_config(copied("digits-mlp", tmp_path / "mlp"), **settings)
    refused(tmp_path / "mlp", "mlp: ")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "x.py", ""])
def test_an_index_cannot_point_elsewhere(tmp_path, name):
    directory = copied("tiny-llama", tmp_path / "llama")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refused(directory, "is not the name of a weight file")


def test_running_out_of_memory_is_not_the_users_fault(monkeypatch):
    from memdiag.checkpoint import guard

    for error in (MemoryError("full"), torch.OutOfMemoryError("full"), KeyboardInterrupt()):
        with pytest.raises(type(error)), guard.refusing("here"):
            raise error
    with pytest.raises(InputError, match="here: RuntimeError: a b"), guard.refusing("here"):
        raise RuntimeError("a\nb")


# -- tokenizers ----------------------------------------------------------------------------------------------------


def test_tokenizers_are_found():
    gpt2, llama = one(FIXTURES / "tiny-gpt2"), one(FIXTURES / "tiny-llama")
    assert gpt2.tokenizer().pad_token_id is None
    assert pad_id(gpt2.load(), gpt2.tokenizer()) == 0
    assert pad_id(llama.config, llama.tokenizer()) == 1
    text = "The tide came in — before we had packed the boat."
    assert gpt2.tokenizer().decode(gpt2.tokenizer()(text)["input_ids"]) == text
    assert one(FIXTURES / "digits-mlp").tokenizer() is None
    assert one(FIXTURES / "tiny-vit").tokenizer() is None
    assert one(FIXTURES / "digits-mlp").tokenizer(str(FIXTURES / "tiny-gpt2")) is not None
    run = open_checkpoints(FIXTURES / "run")
    assert not (run[0].path / "tokenizer.json").exists()
    assert all(c.tokenizer() is not None for c in run)


def test_a_tokenizer_file_alone_is_enough(tmp_path):
    shutil.copy(FIXTURES / "tiny-gpt2" / "tokenizer.json", tmp_path)
    assert len(one(FIXTURES / "digits-mlp").tokenizer(str(tmp_path))) == 512


def test_tokenizers_that_cannot_be_had(tmp_path):
    with pytest.raises(InputError, match="its tokenizer cannot be read"):
        one(BROKEN / "broken-tokenizer").tokenizer()
    with pytest.raises(InputError, match="no tokenizer there"):
        one(FIXTURES / "digits-mlp").tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        *[({}, 0), ({"pad_token_id": 3}, 3), ({"pad_token_id": None}, 0), ({"pad_token_id": -1}, 0)],
        *[({"pad_token_id": 9, "vocab_size": 9}, 0), ({"pad_token_id": 8, "vocab_size": 9}, 8)],
    ],
)
def test_pad_id_is_always_a_token(config, wanted):
    assert pad_id(config) == wanted


# -- saving --------------------------------------------------------------------------------------------------------


def test_save_and_open_again(tmp_path):
    found = one(FIXTURES / "tiny-llama")
    save(tmp_path / "deep" / "again", found.load(), tokenizer=found.tokenizer(), task="task:pydoc?chars=9")
    again = one(tmp_path / "deep" / "again")
    assert again.task == "task:pydoc?chars=9"
    assert again.load().config.memdiag_task == "task:pydoc?chars=9"
    assert again.tokenizer().pad_token_id == 1
    tokens = torch.arange(30).reshape(2, 15)
    assert torch.equal(again.load()(tokens).logits, found.load()(tokens).logits)
    assert [child.name for child in (tmp_path / "deep").iterdir()] == ["again"]
    assert {child.stat().st_mode & 0o777 for child in again.path.iterdir()} == {0o644}


def test_save_repeats_byte_for_byte(tmp_path):
    found = one(FIXTURES / "digits-mlp")
    save(tmp_path / "mlp", found.load(), task=found.task)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "mlp" / name).read_bytes() == (found.path / name).read_bytes()


def test_save_never_overwrites_and_leaves_nothing_half_done(tmp_path):
    model = MLP(MlpConfig((2, 2)))
    (tmp_path / "empty").mkdir()
    (tmp_path / ".empty.partial").mkdir()  # of a process that was killed
    save(tmp_path / "empty", model)
    assert one(tmp_path / "empty").load() is not None
    for taken in ("empty", "file"):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="not an empty directory"):
            save(tmp_path / taken, model)

    class Failing:
        def save_pretrained(self, _):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save(tmp_path / "new", model, tokenizer=Failing())
    assert sorted(child.name for child in tmp_path.iterdir()) == ["empty", "file"]


def test_tied_weights_are_saved_once(factories):
    sys.path.insert(0, str(factories))
    import ckpt_factories

    save(factories / "tied", ckpt_factories.tied())
    assert list(load_file(factories / "tied" / "model.safetensors")) == ["embed.weight"]
    assert one(factories / "tied", model="ckpt_factories:tied").load() is not None


# -- costs ---------------------------------------------------------------------------------------------------------


def test_importing_and_listing_do_not_import_torch():
    code = (
        "import sys; from memdiag import checkpoint; "
        f"checkpoint.open_checkpoints({str(FIXTURES / 'run')!r})[0].fingerprint(); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_fingerprint_needs_no_memory(tmp_path):
    save_file({f"t{i}": torch.zeros(1 << 20) for i in range(32)}, tmp_path / "w.safetensors")  # 128 MB
    code = (
        "import resource; from memdiag import checkpoint; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        f"checkpoint.open_checkpoints({str(tmp_path / 'w.safetensors')!r}, model='math:sin')[0].fingerprint(); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    grown = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert grown < 32 * 1024 * (1024 if sys.platform == "darwin" else 1)  # kB on Linux, bytes on macOS


def test_no_warning_on_a_clean_load():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one(FIXTURES / "tiny-gpt2").load()
