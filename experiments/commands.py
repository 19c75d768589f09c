"""From what an experiment wrote down of its options back to the command line that ran it."""

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import compare, filtering
from experiments.datasets import options_of
from experiments.settings import Options, complete, older_defaults, to_json

# Options without influence on what is reported.
_SILENT = {"save_minutes", "summary", "debug_nans", "distributed", "coordinator", "num_processes", "process_id"}


def to_command(
    experiment: str, settings: Mapping[str, Any], more: Mapping[str, Any] | None = None, positional: Sequence[str] = ()
) -> str:
    """The command line of an experiment: the options, as JSON has them, that differ from what they would be without.

    Args:
      experiment: the module's name.
      settings: all options.
      more: others that are given in any case.
      positional: what comes first.
    """
    usual = _usual(experiment, settings)
    if experiment not in ("filtering", "compare"):
        settings = {**older_defaults(), **settings}
    given = {
        name: value
        for name, value in settings.items()
        if name not in _SILENT and value is not None and (name not in usual or value != usual[name])
    }
    words = ["python", "-m", f"experiments.{experiment}", *positional]
    for name, value in {**given, **(more or {})}.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def _usual(experiment: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the options are that nobody gives, where the data set, the weights and --quick are given."""
    if experiment == "filtering":
        return _json_of(filtering.Settings())
    if experiment == "compare":
        fields = dataclasses.fields(compare.Choice)
        return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    plain = _json_of(Options())
    data = vars(options_of(settings))
    options = Options(**data, weights=settings.get("weights"), quick=settings.get("quick", False))
    try:
        recipe = to_json(complete(options, experiment))
    except ValueError:  # of a data set that this version does not know
        return plain
    return recipe | {name: plain[name] for name in (*data, "weights", "quick", "workdir")}


def _json_of(options: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(options), default=str))
