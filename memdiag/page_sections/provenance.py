"""Where a report comes from, as label and value, and the shell lines that make it again. Needs no torch."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LONGEST = 300  # letters of a value
WHERE = "paths are as they were typed: run it in that directory"
DIGITS = 12  # of a fingerprint
# beginning of a report's kind -> command, where its options are declared, the option that is its argument
COMMANDS = {
    "entropy": ("entropy", "memdiag.entropy_report:EntropyOptions", "checkpoint"),
    "score": ("score", "memdiag.score_report:ScoreOptions", "source"),
    "score.second-split": ("score --second-split", "memdiag.second_split_report:SecondSplitOptions", None),
    "counterfactual": ("counterfactual", "memdiag.counterfactual_report:CounterfactualOptions", None),
    "prune-memorizers": ("prune-memorizers", "memdiag.prune_report:PruneOptions", "checkpoint"),
    "reproduce": ("reproduce", "memdiag.reproduce_report:ReproduceOptions", "name"),
    "train": ("train", "memdiag.train_report:TrainOptions", None),
    "train-gapt": ("train-gapt", "memdiag.train_gapt_report:TrainGaptOptions", "checkpoint"),
}
# options that are switched off by another name than --no-NAME
OFF = {"reset_on_enter": "--keep-on-enter"}
# parts of a run that `memdiag rerun` does not take -> the report that it takes instead
PARTS = {
    "counterfactual.shard": "../counterfactual.parquet",
    "counterfactual.examples": "counterfactual.parquet",
    "train.trajectory": "../history.parquet",
}


def pairs(meta: Mapping[str, Any], *, rows: int | None = None) -> tuple[tuple[str, str], ...]:
    """(label, value) of what the metadata tells of a report; what it does not tell is left out.

    Args:
        meta: of the report, as `tables.read_meta`; anything may be missing or of another type.
        rows: of the report; None: not known.
    """
    kind, version = _text(meta.get("report")), meta.get("schema_version")
    about = kind + (f", schema version {_text(version)}" if version is not None else "")
    found = [
        ("Report", about + (f", {rows:,} rows" if rows is not None else "")),
        ("Made by", _versions(meta)),
        ("Checkpoint" if not _is_several(meta) else "Checkpoints", _checkpoints(meta.get("checkpoint"))),
        *_judged(meta.get("options"), meta.get("of")),
        ("Data", _dataset(meta.get("dataset") or meta.get("task"), meta.get("n_examples"))),
        ("Held out", _dataset(meta.get("test") or meta.get("val"), None)),
        ("Model", _model(meta)),
        ("Paper", _text(meta.get("paper"))),
        ("Seed", _text(meta.get("seeds") or meta.get("seed"))),
        ("Device", _text(meta.get("device"))),
        ("Precision", _text(meta.get("dtype"))),
        ("Options that are not default", " ".join(options_of(meta))),
    ]
    return tuple((label, value) for label, value in found if value)


def _judged(options: Any, of: Any) -> list[tuple[str, str]]:
    """What `memdiag check` and `memdiag diff` looked at; nothing of any other report."""
    if not isinstance(options, Mapping) or not isinstance(of, Mapping):
        return []
    names = {"report": "Report checked", "base": "Base report", "new": "New report"}
    found = [(label, _text(options.get(name))) for name, label in names.items()]
    keys = of.get("keys")
    return [*found, ("Kind of report", _text(of.get("report"))), ("Paired by", _text(keys))]


def shell_lines(meta: Mapping[str, Any], path: Path) -> str:
    """The shell lines that make a report again: `memdiag rerun`, and below it the command as it was given.

    Args:
        meta: of the report.
        path: as the user gave it.
    Returns:
        "" where the metadata tells neither.
    """
    kind, lines = str(meta.get("report")), []
    command = _command_of(kind)
    is_foreign = kind == "score" and meta.get("foreign")  # no run makes imported columns
    if (command is not None and not is_foreign) or kind == "check" or kind.startswith("diff."):
        target = Path(os.path.normpath(path.parent / PARTS[kind])) if kind in PARTS else path
        lines.append(f"memdiag rerun {quoted(_as_argument(str(target)))}")
    made = ""
    if command is not None and isinstance(meta.get("options"), Mapping):
        argument = command[2]
        given = meta["options"].get(argument) if argument else None
        first = [] if given is None else [quoted(_as_argument(str(given)))]
        made = " ".join(["memdiag", command[0], *first, *options_of(meta)])
    elif kind == "check" or kind.startswith("diff."):
        made = _judging(kind, meta.get("options"))
    if made:
        lines += [f"# {'or, as it was made' if lines else 'as it was made'}; {WHERE}", made]
    return "\n".join(lines)


def _judging(kind: str, options: Any) -> str:
    """The command that judged; "" where no options say it: rules may each have a condition and a confidence."""
    if not isinstance(options, Mapping) or not isinstance(options.get("rules"), list):
        return ""
    from memdiag.check_report import CheckOptions
    from memdiag.diff_report import DiffOptions

    is_check = kind == "check"
    paths = [options.get(name) for name in (("report",) if is_check else ("base", "new"))]
    rules = [_rule(rule) for rule in options["rules"]]
    if not all(isinstance(path, str) for path in paths) or None in rules or (is_check and not rules):
        return ""
    shared = {(rule.get("where"), rule.get("confidence")) for rule in options["rules"]}
    where, confidence = next(iter(shared), (None, None))
    # --where and --confidence are of all rules; those of diff have none of their own
    if len(shared) > 1 or (not is_check and (where, confidence) != (None, None)):
        return ""
    words = ["memdiag", "check" if is_check else "diff", *(quoted(_as_argument(str(path))) for path in paths)]
    words += [f"--rule {quoted(rule)}" for rule in rules if rule is not None]
    words += [f"--where {quoted(str(where))}"] * (where is not None)
    words += [f"--confidence {_text(confidence)}"] * (is_check and confidence is not None)
    declared = dataclasses.fields(CheckOptions if is_check else DiffOptions)
    return " ".join(words + _given(options, [field for field in declared if field.name != "rules"]))


def _rule(rule: Any) -> str | None:
    """A rule as --rule takes it; None: no option says this one."""
    from memdiag.rules import Change, Rule, change_of, rule_of

    texts, numbers = ("column", "name", "sql", "where"), ("confidence", "least", "most")
    if not isinstance(rule, Mapping):
        return None
    if not all(isinstance(rule.get(key, ""), str | None) for key in texts) or not all(
        isinstance(rule.get(key, 0), int | float | None) for key in numbers
    ):
        return None
    try:
        if "column" in rule:
            change = Change(**rule)
            said = rule_of(change.sql)
            return change.sql if said.name and change_of(said.name, said.sql) == change else None
        own = Rule(**rule)
    except TypeError:
        return None
    text = f"{own.name}: {own.sql}" if own.name is not None else own.sql
    read = rule_of(text, where=own.where, confidence=own.confidence)
    return text if read == own else None


def options_of(meta: Mapping[str, Any]) -> list[str]:
    """The options that are not default as words of a shell line; those that this version does not know are left out."""
    command, options = _command_of(str(meta.get("report"))), meta.get("options")
    if command is None or not isinstance(options, Mapping):
        return []
    _, where, argument = command
    module, _, name = where.partition(":")
    declared = dataclasses.fields(getattr(importlib.import_module(module), name))
    return _given(options, [field for field in declared if field.name != argument])


def _given(options: Mapping[str, Any], declared: Sequence[dataclasses.Field[Any]]) -> list[str]:
    """Those of the declared options that are not default, as words of a shell line."""
    words = []
    for field in declared:
        value = options.get(field.name, field.default)
        if value is None or value == field.default:
            continue
        option = f"--{field.name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value is False:
            words.append(OFF.get(field.name, f"--no-{option[2:]}"))
        else:
            words.append(f"{option} {quoted(_text(value, most=None))}")
    return words


def unknown_options(meta: Mapping[str, Any]) -> list[str]:
    """Options in the metadata that the command of this version does not have."""
    command, options = _command_of(str(meta.get("report"))), meta.get("options")
    if command is None or not isinstance(options, Mapping):
        return []
    module, _, name = command[1].partition(":")
    known = {field.name for field in dataclasses.fields(getattr(importlib.import_module(module), name))}
    return sorted(str(option) for option in options if option not in known | {command[2]})


def quoted(text: str) -> str:
    """A word of a shell line; what cannot be printed is written in escapes, so that a paste does nothing of its own."""
    if text.isprintable():
        return shlex.quote(text)
    escaped = "".join(
        letter.replace("\\", "\\\\").replace("'", "\\'")
        if letter.isprintable()
        else "".join(f"\\x{byte:02x}" for byte in letter.encode(errors="surrogateescape"))
        for letter in text.encode(errors="surrogateescape").decode(errors="surrogateescape")
    )
    return f"$'{escaped}'"


def _as_argument(path: str) -> str:
    """A path that no command takes for an option."""
    return f"./{path}" if path.startswith("-") else path


def _command_of(kind: str) -> tuple[str, str, str | None] | None:
    return COMMANDS.get(kind) or COMMANDS.get(kind.partition(".")[0])


def _versions(meta: Mapping[str, Any]) -> str:
    names = {"memdiag_version": "memdiag", "torch": "torch", "transformers": "transformers"}
    return ", ".join(f"{shown} {_text(meta[name])}" for name, shown in names.items() if meta.get(name))


def _is_several(meta: Mapping[str, Any]) -> bool:
    return isinstance(meta.get("checkpoint"), list) and len(meta["checkpoint"]) > 1


def _checkpoints(found: Any) -> str:
    """One with its fingerprint; of several how many, the first and the last."""
    if not isinstance(found, list):
        return _checkpoint(found)
    if len(found) < 2:
        return _checkpoint(found[0]) if found else ""
    return f"{len(found)}: {_checkpoint(found[0])} … {_checkpoint(found[-1])}"


def _checkpoint(found: Any) -> str:
    if not isinstance(found, Mapping):
        return _text(found)
    name, weights = _text(found.get("name")), _text(found.get("weights"))
    return f"{name} (weights {weights[:DIGITS]})" if weights else name


def _dataset(found: Any, n: Any) -> str:
    if isinstance(found, Sequence) and not isinstance(found, str):
        more = f" and {len(found) - 1:,} more" if len(found) > 1 else ""
        return _text(found[0], LONGEST - len(more)) + more if found else ""
    if not isinstance(found, Mapping):
        return _text(found)
    n = found.get("n_examples", n)
    parts = [_text(found.get("name"))]
    parts += [f"{n:,} examples"] if isinstance(n, int) else []
    parts += [f"fingerprint {_text(found['fingerprint'])[:DIGITS]}"] if found.get("fingerprint") else []
    return ", ".join(part for part in parts if part)


def _model(meta: Mapping[str, Any]) -> str:
    model, config = meta.get("model"), meta.get("config")
    if not isinstance(config, Mapping):
        return _text(model)
    shape = {
        key: config[key]
        for key in (
            "model_type",
            "widths",
            "channels",
            "n_layer",
            "n_embd",
            "n_head",
            "num_hidden_layers",
            "hidden_size",
        )
        if key in config
    }
    told = ", ".join(f"{key} {_text(value)}" for key, value in shape.items())
    return f"{_text(model)} ({told})" if model and told else _text(model) or told


def _text(value: Any, most: int | None = LONGEST) -> str:
    """Any value of the metadata as text; "" for none."""
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(one, int | str) for one in value):
        text = ", ".join(map(str, value))
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if most is None or len(text) <= most else text[: most - 1] + "…"
