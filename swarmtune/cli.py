"""The command line: ``swarmtune recipe=... key=value`` to train, and the verbs.

Nothing heavy is imported before it is needed, so that ``--help`` is instant.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.resources
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import swarmtune
from swarmtune.errors import BlocksUnserved, NonFinite, PeersUnreachable, SwarmMismatch, SwarmtuneError, UsageError
from swarmtune.notices import printable

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

VERBS = {
    "serve": ("", "serve some blocks of a model to others"),
    "ls": ("swarmtune.commands.ls", "list the recipes, or the options of a group"),
    "cp": ("swarmtune.commands.cp", "copy a recipe, to make it your own"),
    "show": ("swarmtune.commands.show", "print the whole configuration of a recipe or of a run"),
    "validate": ("swarmtune.commands.validate", "check a recipe without starting anything"),
    "export": ("swarmtune.commands.export", "write the adapter of a run for PEFT, or merged into a whole model"),
    "plot": ("swarmtune.commands.plot", "draw what runs have measured"),
    "doctor": ("swarmtune.doctor.command", "look at this machine, and at a swarm"),
    "completion": ("swarmtune.commands.completion", "print the script that completes words in bash, zsh or fish"),
}
"""Each verb: the module whose ``main(words)`` it is, and a line about it. ``serve`` is a program of its own, which nothing here imports."""
COMPLETE = "__complete"
"""The verb that the completion scripts call."""

HELP = """\
swarmtune: fine-tune a model whose frozen body runs on a swarm of servers; all that learns stays here.

  swarmtune recipe=NAME [key=value ...]     train
  swarmtune -m recipe=NAME key=a,b ...      train once for every combination of values, over one swarm; a table at the end
{verbs}
  swarmtune VERB --help | --help | --version

Recipes: {recipes}   (or recipe=FILE.yaml, a recipe of your own: swarmtune cp makes one)

Often changed:
  model=PATH|ID                a local directory in Hugging Face layout, or a hub id   (default: the pocket BLOOM that comes along)
  data=PATH|ID                 a json, jsonl, parquet, csv or text file, a pattern, a directory, or a hub id   (default: Python's help topics)
  data.text_column=text        or data.text_template='{{question}} {{answer}}'; data.streaming=true; docs/data.md has the rest
  adapter=PATH                 go on from a saved PEFT directory
  adapter.r=16                 any field of PEFT's config
  optimizer.lr=1e-3            optimizer.schedule=cosine|linear|constant, optimizer.warmup_steps=10
  trainer.max_steps=200        any flag of lightning.Trainer: accumulate_grad_batches, precision, fast_dev_run, limit_val_batches, ...
  data.sequence_length=128     data.batch_size=8
  swarm.servers=2              or swarm.spans=[0:2,2:4]; swarm=join 'swarm.initial_peers=[...]' for a swarm that is already there
  run_dir=PATH                 where everything is written   (default: runs/<name>/<time>)
  resume=RUN|auto              go on with an interrupted run; auto takes the latest one of the same configuration, or begins a new one
  seed=0  logger=wandb  debug=short

Example:
  swarmtune recipe=lora_bloom data=notes.jsonl trainer.max_steps=500
"""
WRONG_INPUT = (UsageError, NonFinite, PeersUnreachable, BlocksUnserved, SwarmMismatch)
"""What the user can mend by giving something else; the rest is the swarm's failure, as are servers that go away in the middle of a run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0; 1 when the swarm failed; 2 when something the user gave is wrong; 130 after Ctrl-C.
    """
    started = time.monotonic()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words, started)
    except SwarmtuneError as error:
        print(f"swarmtune: {printable('; '.join([str(error), *getattr(error, '__notes__', ())]), 4000)}", file=sys.stderr)
        in_a_run = isinstance(error, BlocksUnserved) and bool(getattr(error, "__notes__", ()))
        return EXIT_USAGE if isinstance(error, WRONG_INPUT) and not in_a_run else EXIT_FAILED
    except KeyboardInterrupt as error:
        print(f"swarmtune: {printable(str(error)) or 'interrupted'}", file=sys.stderr)
        return EXIT_INTERRUPTED


def _dispatch(words: list[str], started: float) -> int:
    if not words:
        print(help_text(), end="", file=sys.stderr)
        return EXIT_USAGE
    if words[0] in ("-h", "--help", "help"):
        print(help_text(), end="")
        return 0
    if words[0] == "--version":
        print(f"swarmtune {swarmtune.__version__}")
        return 0
    if words[0] == "serve":
        print(end="", flush=True)  # nothing, where standard output is closed
        os.execv(sys.executable, [sys.executable, "-P", "-m", "servers", *words[1:]])
    if words[0] not in (*VERBS, COMPLETE) and {"-h", "--help"} & set(words):
        print(help_text(), end="")
        return 0
    if words[0] not in (*VERBS, COMPLETE) and {"-m", "--multirun"} & set(words):
        return _sweep([word for word in words if word not in ("-m", "--multirun")], started)
    if words[0] == COMPLETE:
        from swarmtune.commands.complete import main as complete

        return complete(words[1:])
    if words[0] in VERBS:
        _quieten()
        verb: Callable[[list[str]], int] = importlib.import_module(VERBS[words[0]][0]).main
        return verb(words[1:])
    if words[0].startswith("-"):
        raise UsageError(f"there is no option {words[0]}; swarmtune --help lists what there is")
    if "=" not in words[0] and words[0][:1] not in ("+", "~"):
        raise UsageError(f"there is no command {words[0]!r}; {_meant(words[0])}")
    return _train(words, started)


def _meant(word: str) -> str:
    if word in recipe_names() or word.endswith(".yaml"):
        return f"did you mean recipe={word}?"
    close = difflib.get_close_matches(word, VERBS, 1)
    return f"did you mean {close[0]}?" if close else "swarmtune --help lists what there is"


def recipe_names() -> list[str]:
    """The recipes in ``conf/recipe``."""
    folder = importlib.resources.files("conf").joinpath("recipe")
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def help_text() -> str:
    """What ``--help`` prints."""
    verbs = "\n".join(f"  swarmtune {name:<32}{line}" for name, (_, line) in VERBS.items())
    return HELP.format(verbs=verbs, recipes=", ".join(recipe_names()))


def _train(words: list[str], started: float) -> int:
    from swarmtune.resume import plan_run

    _end_as_ctrl_c_does()
    _quieten()
    plan = plan_run(words)
    if plan.finished and plan.run_dir is not None:
        print(f"the run {plan.run_dir} is finished; {plan.run_dir / 'summary.json'} has its figures")
        return 0
    from swarmtune.app import train

    _print_summary(train(plan.config, started, resume=plan.run_dir))
    return 0


def _sweep(words: list[str], started: float) -> int:
    _end_as_ctrl_c_does()
    _quieten()
    if not words:
        raise UsageError("a sweep takes the words of a run, some with several values: swarmtune -m recipe=lora_bloom optimizer.lr=1e-3,1e-2")
    from swarmtune.sweep import run_sweep

    return run_sweep(words, started)


def _end_as_ctrl_c_does() -> None:
    """SIGTERM stops a run as Ctrl-C does, before and after the training itself too."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _quieten() -> None:
    """Keep other libraries' tips and notices, which nobody can act on, out of a run's output; our own warnings, and their others, are shown."""
    import logging
    import warnings

    from swarmtune.notices import show_warnings

    show_warnings()

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("HIVEMIND_LOGLEVEL", "ERROR")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as servers do, which may share this machine's cores
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):  # not their parent: Lightning resets its level when imported
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for message in (r".*does not have many workers", r".*LeafSpec", r".*is_gradient_checkpointing", r".*in eval mode at the start"):
        warnings.filterwarnings("ignore", message=message)


def _print_summary(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    lines = [Text.assemble((f"{name:<21}", "bold"), value) for name, value in _facts(summary)]
    for line in (Text(), *lines, Text(), Text(_loading_title(summary), "bold"), Text(_loading_lines(summary))):
        console.print(line, soft_wrap=True)


def _facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    trainable, total = summary["trainable_params"], summary["total_params"]
    facts = [
        ("trained", f"{summary['recipe']} on {summary['model']}, {summary['steps']} steps"),
        ("parameters", f"{trainable:,} of {total:,} ({trainable / total:.2%})"),
    ]
    if summary.get("val_accuracy_before") is not None and summary.get("val_accuracy_after") is not None:
        facts.append(("held-out accuracy", f"{summary['val_accuracy_before']:.1%} -> {summary['val_accuracy_after']:.1%}"))
    if summary["val_ppl_before"] is not None and summary["val_ppl_after"] is not None:
        facts.append(("held-out perplexity", f"{summary['val_ppl_before']:,.1f} -> {summary['val_ppl_after']:,.1f}"))
    changes = summary.get("events", {}).get("compiled", 0)
    retries = f", {summary['retries']} retries" if summary["retries"] else ""
    facts += [
        ("speed", f"{summary['tokens_per_s']:,.0f} training tokens/s, {summary['seconds']:,.0f} s in all"),
        ("traffic", f"{summary['bytes_up'] / 1e6:,.1f} MB up, {summary['bytes_down'] / 1e6:,.1f} MB down{retries}"),
        ("of it, a step", f"{summary['bytes_up_per_step'] / 1e6:,.2f} MB up, {summary['bytes_down_per_step'] / 1e6:,.2f} MB down"),
        *([("faults", _faults(summary))] if set(summary.get("events", ())) & EVENT_WORDS.keys() else []),
        *([("compiled code", f"{int(changes):,} changes between eager and compiled code; last digits differ between the two")] if changes else []),
        ("run directory", summary["run_dir"]),
    ]
    if summary["loss_curve"]:
        facts.append(("loss curve", summary["loss_curve"]))
    return [*facts, ("adapter", summary["adapter_dir"])]


EVENT_WORDS = {
    "failed": ("call failed and was done elsewhere", "calls failed and were done elsewhere"),
    "slow": ("slow call was given to another server", "slow calls were given to other servers"),
    "busy": ("call met a busy server", "calls met a busy server"),
    "drained": ("call met a server that shuts down", "calls met a server that shuts down"),
    "cut_off": ("call was cut off here and repeated", "calls were cut off here and repeated"),
    "recomputed": ("forward was run again for its backward", "forwards were run again for their backwards"),
    "resent": ("call had to bring the adapter again", "calls had to bring the adapter again"),
    "waited": ("wait for a server", "waits for a server"),
    "daemon": ("p2p daemon of our own replaced", "p2p daemons of our own replaced"),
}
"""What a summary says of each kind of event that is a fault: of one, and of several."""


def _faults(summary: dict[str, Any]) -> str:
    """What failed, whose fault it was, and what it cost."""
    events = summary["events"]
    said = [f"{int(events[kind]):,} {words[events[kind] > 1]}" for kind, words in EVENT_WORDS.items() if events.get(kind)]
    whose = [f"{label} {int(server['failures'])}" for label, server in summary["servers"].items() if server.get("failures")]
    servers = f" ({', '.join(whose)})" if whose else ""
    return f"{', '.join(said)}{servers}; {events.get('lost_s', 0.0):,.1f} s lost"


OWN_KINDS = ("deep_prompts", "stand_in", "head")


def _own_parts(summary: dict[str, Any]) -> list[str]:
    """The parts of the adapter that PEFT does not know."""
    return [kind.replace("_", " ") for kind in OWN_KINDS if (Path(summary["adapter_dir"]) / f"{kind}_config.json").is_file()]


def _loading_title(summary: dict[str, Any]) -> str:
    own = _own_parts(summary)
    return f"load the adapter with swarmtune (PEFT does not know {' and '.join(own)})" if own else "load the adapter with PEFT"


def _loading_lines(summary: dict[str, Any]) -> str:
    if _own_parts(summary):
        load = "load_sequence_classifier" if summary.get("labels") else "load_causal_lm"
        return (
            "import swarmtune\n"
            "swarm = swarmtune.connect(initial_peers)\n"
            f"model = swarmtune.{load}({summary['model']!r}, swarm, adapter={summary['adapter_dir']!r})"
        )
    kind, classes = "AutoModelForCausalLM", ""
    if summary.get("labels"):
        kind, classes = "AutoModelForSequenceClassification", f", num_labels={len(summary['labels'])}"
    return (
        "from peft import PeftModel\n"
        f"from transformers import {kind}\n"
        f"model = PeftModel.from_pretrained({kind}.from_pretrained({summary['model']!r}{classes}), {summary['adapter_dir']!r})"
    )


if __name__ == "__main__":
    if not sys.flags.safe_path and Path.cwd() != Path(swarmtune.__file__).parents[1]:
        sys.path.pop(0)  # python -m puts the current directory there, and with it anybody's conf, recipes and servers
    sys.exit(main())
