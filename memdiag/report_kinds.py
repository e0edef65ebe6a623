"""Every report there is, by its name, and where its rows are declared. Needs no torch."""

from __future__ import annotations

import importlib

from memdiag.errors import unknown

# These modules import without torch.
ROWS = {
    "check": "memdiag.check_report:CheckRow",
    "counterfactual": "memdiag.counterfactual_rows:CounterfactualRow",
    "counterfactual.examples": "memdiag.counterfactual_rows:ExampleRow",
    "counterfactual.influence": "memdiag.counterfactual_rows:InfluenceRow",
    "counterfactual.models": "memdiag.counterfactual_rows:ModelRow",
    "counterfactual.shard": "memdiag.counterfactual_rows:ShardRow",
    "counterfactual.sizes": "memdiag.counterfactual_rows:SizeRow",
    "counterfactual.turn-over-dropout": "memdiag.counterfactual_rows:TurnOverRow",
    "diff.columns": "memdiag.diff_rows:ColumnRow",
    "diff.movers": "memdiag.diff_rows:MoverRow",
    "diff.rules": "memdiag.diff_report:RuleRow",
    "entropy": "memdiag.entropy_report:EntropyRow",
    "entropy.gradients": "memdiag.entropy_report:GradientRow",
    "prune-memorizers.pruning": "memdiag.prune_report:PruningRow",
    "prune-memorizers.neurons": "memdiag.prune_report:NeuronRow",
    "prune-memorizers.dynamics": "memdiag.prune_report:DynamicsRow",
    "prune-memorizers.filtration": "memdiag.prune_report:FiltrationRow",
    "reproduce.claims": "memdiag.reproduce_report:ClaimRow",
    "reproduce.phases": "memdiag.reproduce_report:PhaseRow",
    "reproduce.effects": "memdiag.reproduce_report:EffectRow",
    "reproduce.runs": "memdiag.reproduce_report:RunRow",
    "score": "memdiag.score_report:ScoreRow",
    "score.second-split": "memdiag.second_split_report:SecondSplitRow",
    "train.history": "memdiag.train_report:HistoryRow",
    "train.examples": "memdiag.train_report:ExampleRow",
    "train.trajectory": "memdiag.trajectory:TrajectoryRow",
    "train-gapt.history": "memdiag.train_gapt_report:HistoryRow",
    "train-gapt.compare": "memdiag.train_gapt_report:CompareRow",
}


def row_of(report: str) -> type:
    """The row dataclass of a report by its name."""
    if report not in ROWS:
        raise unknown("report", report, ROWS)
    module, _, name = ROWS[report].partition(":")
    row: type = getattr(importlib.import_module(module), name)
    return row
