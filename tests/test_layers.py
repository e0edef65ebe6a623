"""Which module may import which, what only one file may do, and what none may."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import memdiag

ROOT = Path(memdiag.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TREES = {file: ast.parse(file.read_text()) for file in FILES}

# A module imports from lower ones only. A new module needs a line here.
LAYER = {
    "errors": 0, "progress": 0, "ranks": 0, "spectrum": 0, "keywords": 1,
    "modular": 1, "drawing": 1, "workers": 1, "gapt": 1, "subsets": 1,
    "engine_processes": 2, "engine_ray": 3, "engine": 4,
    "__init__": 2, "tables": 2, "tasks": 2, "models": 2, "device": 2, "mbe": 2,
    "checkpoint": 3, "dataset": 3, "scores": 3, "trajectory": 3,
    "packing": 4, "observe": 4, "fourier": 4, "attribution": 4, "pruning": 4,
    "alignment": 5, "oscillation": 5, "entropy_report": 5, "entropy_view": 5, "grokking": 5, "reading": 5,
    "regulariser": 5, "training": 5, "train_gapt_report": 5, "train_report": 5, "score_report": 5, "agreement": 5,
    "score_summary": 6, "score_view": 6, "train_view": 6, "supervised": 6, "scoring": 6, "score_inputs": 6,
    "forgetting": 6, "second_split_report": 6, "import_report": 7, "second_split_view": 7, "trajectory_recorder": 7,
    "train_models": 7, "score_job": 7, "score_looking": 8, "score_joining": 8,
    "train_inputs": 8, "score_run": 9, "train_plan": 9, "train_run": 10, "second_split_run": 10,
    "prune_report": 5, "reproduce_report": 5, "reproduce_claims": 5,
    "layer_sums": 6, "gapt_training": 6, "train_gapt_inputs": 6, "train_gapt_view": 6,
    "prune_view": 6, "prune_curves": 6, "reproduce_view": 6, "reproduce_effects": 6, "reproduce_gapt_view": 6,
    "measuring": 7, "train_gapt_run": 7, "prune_modular": 7, "prune_inputs": 7,
    "entropy_run": 8, "train_gapt_compare": 8, "prune_subject": 8, "reproduce_grok": 8,
    "prune_checkpoint": 9, "reproduce_run": 9,
    "reproduce_gapt": 9, "reproduce_gapt_run": 10, "prune_run": 10,
    "memorization": 6, "influence": 6, "size_trajectories": 6, "ensemble": 7, "turnover_dropout": 7,
    "counterfactual_rows": 3, "counterfactual_report": 6, "counterfactual_shards": 6, "counterfactual_view": 7,
    "counterfactual_summary": 7, "counterfactual_estimates": 8, "counterfactual_merge": 9,
    "counterfactual_job": 10, "counterfactual_run": 11, "reproduce_tail_arms": 7, "reproduce_tail": 11,
    "counterfactual_sizes": 12, "counterfactual_turnover": 12,
    "verdicts": 0, "mean_interval": 0, "rules": 1, "paired_rates": 1, "verdict_words": 1,
    "verdict_markdown": 2, "verdict_formats": 3, "report_kinds": 3,
    "report_sql": 3, "diff_rows": 3, "rule_sql": 4, "pairing": 4, "judging": 5, "diff_columns": 5,
    "check_report": 6, "diff_movers": 6, "diff_report": 7, "diff_view": 7, "diff_run": 8,
    "page_text": 0, "page_svg": 1, "page": 3, "page_sections": 9, "page_report": 10,
    "cli": 13,
    "__main__": 14,
}  # fmt: skip
# A report is declared below what fills it, so that reading about it needs no torch: the way up is taken when called.
LAZILY_UPWARDS = {
    ("entropy_report", "entropy_run"),
    ("prune_report", "prune_run"),
    ("train_report", "train_run"),
    ("train_report", "train_plan"),
    ("second_split_report", "second_split_run"),
    ("score_report", "score_run"),
    ("train_gapt_report", "train_gapt_run"),
    ("train_gapt_report", "train_gapt_compare"),
    ("counterfactual_report", "counterfactual_run"),
    ("counterfactual_report", "counterfactual_merge"),
    ("counterfactual_run", "counterfactual_sizes"),
    ("counterfactual_run", "counterfactual_turnover"),
    ("reproduce_report", "reproduce_run"),
    ("diff_report", "diff_run"),
    ("reproduce_report", "reproduce_gapt_run"),
    ("reproduce_report", "reproduce_grok"),
}
WITHOUT_TORCH = [
    "memdiag", "memdiag.errors", "memdiag.tables", "memdiag.progress", "memdiag.dataset", "memdiag.tasks",
    "memdiag.spectrum", "memdiag.entropy_report", "memdiag.entropy_view", "memdiag.cli", "memdiag.checkpoint.steps",
    "memdiag.modular", "memdiag.drawing", "memdiag.gapt", "memdiag.train_gapt_report",
    "memdiag.train_gapt_view", "memdiag.reproduce_gapt_view",
    "memdiag.prune_report", "memdiag.prune_view", "memdiag.reproduce_report", "memdiag.scores", "memdiag.trajectory",
    "memdiag.train_report", "memdiag.counterfactual_report", "memdiag.counterfactual_view",
    "memdiag.check_report", "memdiag.diff_report", "memdiag.diff_run", "memdiag.page_report", "memdiag.verdict_formats",
    "memdiag.score_report", "memdiag.score_view", "memdiag.second_split_report",
]  # fmt: skip


def module_of(file):
    """ "memdiag/checkpoint/guard.py" as "memdiag.checkpoint.guard"."""
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def part(module):
    """The name in LAYER: "checkpoint" for "memdiag.checkpoint.guard"."""
    parts = module.split(".")
    if len(parts) == 1:
        return "__init__"
    return parts[1]


def imports(tree):
    """(imported module, when) of every import of memdiag; when is "start", "typing" or "call"."""
    found = []

    def visit(node, when):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            when = "call"
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            when = "typing"
        if isinstance(node, ast.Import):
            found.extend((alias.name, when) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append((inner if inner in MODULES else node.module, when))
        for child in ast.iter_child_nodes(node):
            visit(child, when)

    visit(tree, "start")
    return [(name, when) for name, when in found if name.split(".")[0] == "memdiag"]


def test_every_module_has_its_layer():
    assert {part(module) for module in MODULES} == set(LAYER)


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_upwards(module):
    mine = part(module)
    for target, when in imports(TREES[MODULES[module]]):
        theirs = part(target)
        if when == "typing" or theirs == mine or (when == "call" and (mine, theirs) in LAZILY_UPWARDS):
            continue
        assert LAYER[theirs] < LAYER[mine], f"{module} imports {target}"


def test_no_circle_of_imports_within_a_folder():
    graph = {
        module: {target for target, when in imports(TREES[file]) if when == "start" and target != module}
        for module, file in MODULES.items()
    }
    graphlib.TopologicalSorter(graph).prepare()


def test_a_file_is_named_after_its_noun():
    names = {name for file in FILES for name in file.relative_to(ROOT).with_suffix("").parts}
    assert not names & {"utils", "util", "common", "helpers", "helper", "misc", "base", "core"}


def calls(tree):
    """The last name of everything called: "f" for f(...), a.f(...) and a.b.f(...), with its call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield getattr(node.func, "attr", getattr(node.func, "id", "")), node


def callers(*names):
    """The parts of memdiag that call any of these names."""
    return {part(module_of(file)) for file, tree in TREES.items() for name, _ in calls(tree) if name in names}


def test_only_one_place_does_each_of_these():
    assert callers("ParquetWriter", "write_table", "to_parquet", "write_dataset") == {"tables"}
    hooks = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_hook")
    assert callers(*hooks) == {"observe"}
    assert callers("safe_open", "from_pretrained", "from_config") <= {"checkpoint", "dataset"}


def test_nothing_from_a_file_is_ever_run():
    for file, tree in TREES.items():
        for name, call in calls(tree):
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert said.get("trust_remote_code", "False") == "False", file
            assert said.get("allow_pickle", "False") == "False", file
            assert said.get("weights_only", "True") == "True", file
            whole = ast.unparse(call.func)
            assert name not in ("exec", "execfile", "__import__", "Unpickler"), (file, whole)
            assert whole not in ("eval", "os.system", "os.popen"), (file, whole)
            assert whole.split(".")[0] not in ("pickle", "marshal", "dill", "joblib", "cloudpickle"), (file, whole)
            if whole == "torch.load":
                assert said.get("weights_only") == "True", file
            if whole == "np.load":
                assert said.get("allow_pickle") == "False", file
            if name in ("from_pretrained", "from_config"):
                assert said.get("trust_remote_code") == "False", (file, whole)


def test_no_global_seed_is_set():
    for file, tree in TREES.items():
        for name, call in calls(tree):
            owner = ast.unparse(call.func)
            assert owner not in ("torch.manual_seed", "np.random.seed", "random.seed"), file
            assert name not in ("seed_everything", "set_seed"), file


def test_what_must_start_quickly_does_not_import_torch():
    check = (
        "import importlib, sys\n"
        f"for name in {WITHOUT_TORCH!r}:\n"
        "    importlib.import_module(name)\n"
        "    slow = {'torch', 'transformers', 'pandas', 'matplotlib', 'scipy', 'sklearn'} & set(sys.modules)\n"
        "    assert not slow, f'{name} imports {slow}'\n"
        "    if name == 'memdiag':\n"
        "        assert 'pyarrow' not in sys.modules and 'typer' not in sys.modules\n"
        "import memdiag\n"
        "memdiag.entropy, memdiag.Report, memdiag.read, memdiag.InputError\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_python_api_names_what_it_lacks():
    with pytest.raises(AttributeError, match="has no attribute 'entropie'"):
        memdiag.entropie  # noqa: B018
    lazy = {"Gapt", "Pruned", "Report", "Reproduced", "ReproducedEffects", "Trained", "TrainedGapt"}
    lazy |= {"TrajectoryRecorder", "entropy", "import_score", "prune_memorizers", "read", "reproduce", "score"}
    lazy |= {"Checked", "Diffed", "Page", "check", "diff", "report"}
    lazy |= {"second_split", "train", "train_gapt", "Counterfactual", "counterfactual", "merge_counterfactual"}
    assert set(memdiag.__all__) <= {*dir(memdiag), *lazy}
    for name in memdiag.__all__:
        assert getattr(memdiag, name) is not None
