"""``swarmtune validate``: everything that can be known to be wrong before a server starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swarmtune.commands.arguments import Parser
from swarmtune.commands.show import is_run, recipe_word
from swarmtune.errors import UsageError
from swarmtune.schema import Config, SwarmKind


def parser() -> Parser:
    """What the verb takes."""
    made = Parser(
        "validate",
        "Check a recipe without starting anything: its files and keys, the trainer's flags, the model and whether it can be cut into spans,\n"
        "the adapter on that model, the servers' blocks. Texts are not read, and servers of another swarm are not asked.",
    )
    made.add_argument("recipe", metavar="RECIPE|FILE", help="one of swarmtune ls, or a YAML file of your own")
    made.add_argument("words", nargs="*", metavar="key=value", help="what to change in it, as when training")
    return made


def main(words: list[str]) -> int:
    """Check, and say what would be done; returns the exit code.

    Raises:
        UsageError: whatever is wrong.
    """
    given = parser().read(words)
    name, word = recipe_word("validate", given.recipe)
    if is_run(name):
        raise UsageError(f"validate: {name} is a run, which has been: give a recipe")
    from swarmtune.config import load_config

    print(f"ok: {check(load_config([word, *given.words]))}")
    return 0


def check(config: Config) -> str:
    """What a checked configuration would do, in a line, after the checks that need the model and Lightning.

    Raises:
        UsageError: whatever is wrong.
    """
    from swarmtune.adapters.adapter import offline_adapter, parse
    from swarmtune.app import load_recipe, server_spans, try_trainer
    from swarmtune.config import resolve_path
    from swarmtune.data_schema import Format
    from swarmtune.model import for_task
    from swarmtune.model_files import count_parameters
    from swarmtune.skeleton import check_identity, load_config
    from swarmtune.train.library_keys import peft_config
    from swarmtune.weights import Checkpoint, local_path

    path = resolve_path(config.model.path)
    spans = server_spans(config, path) if config.swarm.kind is SwarmKind.LOCAL else []
    model_config = load_config(path)
    check_identity(model_config)
    if local_path(path) is not None:
        Checkpoint(path)
    chosen = peft_config(config.adapter)
    if config.data.format is Format.LABELS:
        for_task(parse(chosen), "sequence_classification")
    adapter = offline_adapter(model_config, chosen, path)
    try_trainer(config.trainer)
    load_recipe(config.recipe)
    kind = adapter.title
    learn = sum(parameter.numel() for parameter in adapter.parameters())
    servers = (
        f"{len(spans)} server{'s' if len(spans) != 1 else ''} of blocks {', '.join(spans)} on this machine" if spans else "the swarm that it joins"
    )
    return (
        f"{config.title} would train {kind} "
        f"({learn:,} of {count_parameters(path) + learn:,} parameters) on {Path(path).name}, {_length(config.trainer)}, with {servers}"
    )


def _length(flags: Mapping[str, Any]) -> str:
    if flags.get("fast_dev_run"):
        return "one training and one validation batch" if flags["fast_dev_run"] in (True, 1) else f"{flags['fast_dev_run']} batches"
    ends = [f"{flags[f'max_{unit}']} {unit}" for unit in ("steps", "epochs") if flags.get(f"max_{unit}") not in (None, -1)]
    return " or ".join(ends) or "until it is stopped"
