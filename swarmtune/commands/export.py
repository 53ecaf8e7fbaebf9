"""``swarmtune export``: what a run has learned as a PEFT directory, or merged into a whole model."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from swarmtune.commands.arguments import Parser
from swarmtune.errors import UsageError
from swarmtune.files import write_json
from swarmtune.train.run_dir import ADAPTER, CHAT_TEMPLATE, CHECKPOINTS, CONFIG, FACTS, LABELS, LOCK, SUMMARY
from swarmtune.train.saved_state import MANIFEST, STATE, find_damage, newest_checkpoint, step_folders, step_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

ADAPTER_FILE = "adapter_config.json"
OWN_FILES = ("deep_prompts_config.json", "stand_in_config.json", "head_config.json")
"""What marks the parts of an adapter that are not PEFT's."""
MARKER = "swarmtune_export.json"
"""The file by which an export is known again; it says where it came from, and lists what was written."""
DTYPES = ("float32", "bfloat16", "float16")
PROBE_TOKENS = 16
"""Tokens of the text on which models are compared before and after they are written."""


def parser() -> Parser:
    """What the verb takes."""
    made = Parser(
        "export", "Write the adapter of a run as a PEFT directory, checked by loading it again; or a whole model with the adapter merged in."
    )
    made.add_argument("source", metavar="RUN|CHECKPOINT|ADAPTER", help="the directory of a run (its final adapter, else its newest checkpoint),"
                      " of a checkpoint (.../checkpoints/step=N), or of a PEFT adapter")  # fmt: skip
    made.add_argument("destination", metavar="DEST", help="the directory to make")
    made.add_argument("--merge", action="store_true", help="load the whole model, merge the adapter into it, and write model and tokenizer")
    made.add_argument("--dtype", choices=DTYPES, help="of what is written (default: as stored)")
    made.add_argument("--model", metavar="PATH|ID", help="the model, where it is not (or no longer) where the run had it")
    made.add_argument("--force", action="store_true", help="replace an earlier export that is in DEST")
    return made


class Found(NamedTuple):
    """An adapter to export.

    Attributes:
        folder: the PEFT directory.
        what: a phrase that says what it is.
        step: optimizer steps that it has learned for; ``None`` where nothing says.
    """

    folder: Path
    what: str
    step: int | None = None


def main(words: list[str]) -> int:
    """Export; returns the exit code.

    Raises:
        UsageError: nothing to export, no place for it, or it would not load as it is.
    """
    given = parser().read(words)
    found = find_adapter(Path(given.source).expanduser().absolute())
    destination = Path(given.destination).expanduser().absolute()
    _check_destination(destination, given.force)
    model = _model_of(found.folder, given.model)
    export = _export_merged if given.merge else _export_adapter
    export(found, model, destination, given.dtype)
    return 0


def find_adapter(source: Path) -> Found:
    """The PEFT directory that ``source`` holds.

    A run's own ``adapter/`` is its last word only if ``summary.json`` says that the run reached its end, and no later checkpoint is there. Of a
    run's checkpoints the newest whole one counts.

    Raises:
        UsageError: there is none, or it belongs to a checkpoint that is damaged.
    """
    if source.name == STATE:
        source = source.parent
    if not source.is_dir():
        raise UsageError(f"export: there is no directory {source}")
    if _is_adapter(source):
        step = _check_whole(source.parent) if _is_checkpoint(source.parent) else None
        return Found(source, "the adapter", step)
    if _is_checkpoint(source) or step_of(source) is not None:
        step = _check_whole(source)
        return Found(source / ADAPTER, f"the adapter of checkpoint {source.name}", step)
    return _adapter_of_run(source)


def _is_checkpoint(folder: Path) -> bool:
    return (folder / STATE).is_file() or (folder / MANIFEST).is_file()


def _check_whole(checkpoint: Path) -> int | None:
    """The step of a checkpoint, all of whose files are what was written."""
    if (damage := find_damage(checkpoint)) is not None:
        raise UsageError(f"export: the checkpoint {checkpoint} is damaged ({damage}): choose another one, or give the run")
    return step_of(checkpoint)


def _is_adapter(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (ADAPTER_FILE, *OWN_FILES))


def _adapter_of_run(run: Path) -> Found:
    own = run / ADAPTER
    has_own = _is_adapter(own)
    steps = [step_of(folder) or 0 for folder in step_folders(run / CHECKPOINTS)]
    newest = max(steps, default=-1)
    final = _final_step(run)
    if has_own and (final if final is not None else -1) >= newest:
        return Found(own, "the final adapter", final)
    saved = newest_checkpoint(run / CHECKPOINTS)
    if saved is not None and (final is None or saved.step > final or not has_own):
        which = "newest checkpoint" if saved.step == newest else "newest checkpoint that is whole"
        ending = "" if saved.step == final else " (the run has not reached its end)"
        return Found(saved.folder / ADAPTER, f"the adapter of the {which}, step {saved.step}{ending}", saved.step)
    if has_own and final is not None:
        return Found(own, "the final adapter", final)
    if steps:
        raise UsageError(f"export: every checkpoint of {run} is damaged, and nothing says that the run reached its end")
    raise UsageError(f"export: {run} holds no adapter: expected the directory of a run, of a checkpoint or of a PEFT adapter")


def _final_step(run: Path) -> int | None:
    """The step at which a run ended, as its summary says; ``None`` where it did not end."""
    try:
        return int(json.loads((run / SUMMARY).read_text(encoding="utf-8"))["steps"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"export: {run / SUMMARY} cannot be read: give the directory of a checkpoint or an adapter instead") from error


def _check_destination(destination: Path, force: bool) -> None:
    """Refuse a place that is taken, before anything is loaded; ``--force`` replaces an earlier export only, and nothing that lies in a run."""
    if not (destination.exists() or destination.is_symlink()):
        return
    if not force:
        raise UsageError(f"export: {destination} exists already: choose another directory, or add --force")
    if (what := _why_kept(destination)) is not None:
        raise UsageError(f"export: {destination} {what}, so it is not replaced: choose another directory")


def _why_kept(destination: Path) -> str | None:
    """Why a directory is not replaced; ``None`` if it is an earlier export, with nothing added."""
    if destination.is_symlink() or not destination.is_dir():
        return "is not an earlier export"
    place = destination.resolve()
    if run := next((folder for folder in (place, *place.parents) if _is_run(folder)), None):
        return f"lies in the run {run}"
    there = {path.relative_to(destination).as_posix() for path in destination.rglob("*")}
    if not there:
        return None
    try:
        ours = {MARKER, *json.loads((destination / MARKER).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return f"is not an earlier export (it has no {MARKER} that can be read)"
    if others := sorted(there - ours):
        return f"holds {others[0]}, which export did not write"
    return None


def _is_run(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and any((folder / name).exists() for name in (FACTS, SUMMARY, LOCK))


@contextmanager
def _placed(found: Found, model: str, destination: Path) -> Iterator[Path]:
    """A directory to write into, which gets the name ``destination`` once all is written; after an error nothing stays.

    Raises:
        UsageError: it cannot be written, or ``destination`` is the model's own directory.
    """
    local = Path(model).resolve()
    if local.is_dir() and destination.resolve() in (local, *local.parents):
        raise UsageError(f"export: {destination} holds the model itself, so it is not replaced: choose another directory")
    temporary = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
        target = temporary / destination.name
        yield target
        for name in (CHAT_TEMPLATE, LABELS):
            if (found.folder / name).is_file():
                shutil.copyfile(found.folder / name, target / name)
        _mark(target, found)
        _replace(target, destination)
    except OSError as error:
        raise UsageError(f"export: {destination} cannot be written: {error.strerror or ' '.join(str(error).split())[:300]}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _mark(target: Path, found: Found) -> None:
    """Write the marker, and give every file the permissions that a new one has here."""
    paths = sorted(target.rglob("*"))
    usual = next(path for path in paths if path.name in (ADAPTER_FILE, *OWN_FILES, "config.json")).stat().st_mode & 0o777
    for path in paths:
        if path.is_file():
            path.chmod(usual)
    versions = {name: importlib.metadata.version(name) for name in ("swarmtune", "torch", "transformers", "peft")}
    names = [path.relative_to(target).as_posix() for path in paths]
    write_json(target / MARKER, {"source": str(found.folder), "step": found.step, "versions": versions, "files": names})


def _replace(source: Path, target: Path) -> None:
    """Move a directory; a former one disappears only once the new one is in its place."""
    if not target.exists():
        source.rename(target)
        return
    if (what := _why_kept(target)) is not None:  # again: writing may have taken long
        raise UsageError(f"export: {target} {what}, so it is not replaced: choose another directory")
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    target.rename(old / "former")
    source.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _model_of(adapter_dir: Path, given: str | None) -> str:
    """The model that an adapter belongs to: ``--model``, else what the run's configuration says, else what the adapter says."""
    from swarmtune.config import existing_path, resolve_path

    if given is not None:
        return resolve_path(existing_path("model.path", given))
    config = next((parent / "config.yaml" for parent in list(adapter_dir.parents)[:3] if (parent / "config.yaml").is_file()), None)
    try:
        if config is not None:
            import yaml

            name = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["path"]
        else:
            name = json.loads((adapter_dir / ADAPTER_FILE).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"export: {config or adapter_dir / ADAPTER_FILE} does not say which model the adapter is for: give it with --model"
        ) from error
    try:
        return resolve_path(str(name))
    except UsageError as error:
        raise UsageError(f"export: the adapter is for the model {name}, which is not here: give it with --model") from error


def _export_adapter(found: Found, model: str, destination: Path, dtype: str | None) -> None:
    import torch

    from swarmtune.adapters.adapter import offline_adapter
    from swarmtune.skeleton import load_config

    adapter = offline_adapter(load_config(model), found.folder, model)
    if dtype is not None:
        adapter.to(getattr(torch, dtype))
    with _placed(found, model, destination) as target:
        try:
            adapter.save_pretrained(target)
        except UsageError as error:
            raise UsageError(f"export: {str(error).replace(str(target), str(destination))}") from error
    count = sum(parameter.numel() for parameter in adapter.parameters())
    checked = "loaded again by PEFT and equal" if adapter.peft is not None else "in swarmtune's own format, which PEFT does not load"
    print(f"wrote {found.what} ({found.folder}) to {destination}: {count:,} parameters, {checked}")


def _export_merged(found: Found, model: str, destination: Path, dtype: str | None) -> None:
    from swarmtune.adapters.adapter import offline_adapter
    from swarmtune.skeleton import build_skeleton, load_config, stored_dtype

    config = load_config(model)
    adapter = offline_adapter(config, found.folder, model)  # refuses one that does not fit before the whole model is loaded
    if adapter.peft is None or adapter.own or adapter.peft.wrapped is not None:
        raise UsageError(f"export: {adapter.title} cannot be merged into a model's weights: export it without --merge")
    if str(getattr(adapter.peft.config.task_type, "value", adapter.peft.config.task_type)) != "CAUSAL_LM":
        raise UsageError("export: only adapters of causal language models can be merged: export this one without --merge")
    parameters = sum(parameter.numel() for parameter in build_skeleton(config).parameters())
    size = {"float32": 4}.get(dtype, 2) if dtype else stored_dtype(config).itemsize
    print(f"merging loads the whole model: {parameters:,} parameters, about {_human(parameters * size)} of memory", flush=True)
    with _placed(found, model, destination) as target:
        change, rounding, tokenizer = _merge(found.folder, model, target, dtype or "auto")
    print(f"wrote {Path(model).name} with {found.what} ({found.folder}) merged in to {destination}, {tokenizer}")
    advice = "" if rounding <= change / 10 else "; --dtype float32 would keep more of it" if dtype != "float32" else ""
    print(f"loaded again and equal; the adapter changes logits by up to {change:.1e} of the largest, merging rounds by up to {rounding:.1e}{advice}")


def _merge(adapter_dir: Path, model: str, target: Path, dtype: str) -> tuple[float, float, str]:
    """Write the merged model.

    Returns:
        How much the adapter changes any logit, and how much merging changes it once more (both over the largest logit); what became of the tokenizer.

    Raises:
        UsageError: the model is not here, merging changed what it computes, or what was written loads as something else.
    """
    from peft import PeftModel
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()

    def load(path: str | Path) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False).eval()

    base = _here(lambda: load(model), f"the model {model} is neither a whole directory here nor in the cache: give it with --model")
    plain = _probe(base)
    adapted: Any = PeftModel.from_pretrained(base, str(adapter_dir)).eval()
    apart = _probe(adapted)
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UsageError(f"export: PEFT cannot merge this adapter: {' '.join(str(error).split())[:300]}") from error
    together = _probe(merged)
    change, rounding = (((other - apart).abs().max() / apart.abs().max()).item() for other in (plain, together))
    if not rounding <= (1e-3 if merged.dtype.itemsize >= 4 else 0.1):
        raise UsageError(f"export: merging changes logits by {rounding:.1e} of the largest one: nothing was written; try --dtype float32")
    try:
        merged.save_pretrained(target)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    del merged, adapted, base
    again = _probe(load(target))
    if not again.equal(together):
        raise UsageError("export: the merged model would not load as it is: nothing was written")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if Path(model).is_dir() and not list(Path(model).glob("*token*")):
            return change, rounding, "without a tokenizer, because the model has none"
        raise UsageError(f"export: the tokenizer of {model} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    try:
        tokenizer.save_pretrained(target)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from error  # a bare Exception is what the tokenizers library raises on a full disk
    return change, rounding, "with its tokenizer"


def _here(load: Callable[[], PreTrainedModel], sentence: str) -> PreTrainedModel:
    try:
        return load()
    except (OSError, ValueError) as error:
        raise UsageError(f"export: {sentence} ({' '.join(str(error).split())[:200]})") from error


def _probe(model: Any) -> Tensor:
    """Logits over a short text, in float32."""
    import torch

    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(0, vocabulary, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def _human(size_bytes: float) -> str:
    unit = "bytes"
    for larger in ("KB", "MB", "GB", "TB"):
        if size_bytes < 1000:
            break
        size_bytes, unit = size_bytes / 1000, larger
    return f"{size_bytes:.1f} {unit}" if unit != "bytes" else f"{size_bytes:.0f} bytes"
