"""``swarmtune export``: what a run has learned as a PEFT directory, or merged into a whole model."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarmtune.commands.arguments import Parser
from swarmtune.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

ADAPTER_FILE = "adapter_config.json"
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
    made.add_argument("--force", action="store_true", help="replace an adapter or a model that is in DEST")
    return made


def main(words: list[str]) -> int:
    """Export; returns the exit code.

    Raises:
        UsageError: nothing to export, no place for it, or it would not load as it is.
    """
    given = parser().read(words)
    adapter_dir, found = find_adapter(Path(given.source).expanduser().absolute())
    destination = Path(given.destination).expanduser().absolute()
    _check_destination(destination, given.force, "config.json" if given.merge else ADAPTER_FILE)
    model = _model_of(adapter_dir, given.model)
    if given.merge:
        _export_merged(adapter_dir, found, model, destination, given.dtype)
    else:
        _export_adapter(adapter_dir, found, model, destination, given.dtype)
    return 0


def find_adapter(source: Path) -> tuple[Path, str]:
    """The PEFT directory that ``source`` holds, and what it is.

    A run's own ``adapter/`` is its last word only if ``summary.json`` says that the run reached its end, and no later checkpoint is there.

    Raises:
        UsageError: there is none.
    """
    if source.name == "state.ckpt":
        source = source.parent
    if not source.is_dir():
        raise UsageError(f"export: there is no directory {source}")
    if (source / ADAPTER_FILE).is_file():
        return source, "the adapter"
    own = source / "adapter"
    if (source / "state.ckpt").is_file() and (own / ADAPTER_FILE).is_file():
        return own, f"the adapter of checkpoint {source.name}"
    steps = {_step(path.parent.parent): path.parent for path in source.glob(f"checkpoints/step=*/adapter/{ADAPTER_FILE}")}
    newest = max(steps, default=-1)
    if (own / ADAPTER_FILE).is_file() and newest <= _final_step(source, newest):
        return own, "the final adapter"
    if newest >= 0:
        return steps[newest], f"the adapter of the newest checkpoint, step {newest} (the run has not reached its end)"
    raise UsageError(f"export: {source} holds no adapter: expected the directory of a run, of a checkpoint or of a PEFT adapter")


def _step(folder: Path) -> int:
    text = folder.name.removeprefix("step=")
    return int(text) if text.isdecimal() else -1


def _final_step(run: Path, newest: int) -> int:
    """The step at which a run ended, as its summary says; one before the newest checkpoint where it did not end."""
    try:
        return int(json.loads((run / "summary.json").read_text(encoding="utf-8"))["steps"])
    except FileNotFoundError:
        return newest - 1 if newest >= 0 else newest
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"export: {run / 'summary.json'} cannot be read: give the directory of a checkpoint or an adapter instead") from error


def _check_destination(destination: Path, force: bool, marker: str) -> None:
    """Refuse a place that is taken, before anything is loaded; ``--force`` replaces only what looks like an earlier export."""
    if not (destination.exists() or destination.is_symlink()):
        return
    if not force:
        raise UsageError(f"export: {destination} exists already: choose another directory, or add --force")
    replaceable = destination.is_dir() and not destination.is_symlink() and ((destination / marker).is_file() or not any(destination.iterdir()))
    if not replaceable:
        raise UsageError(f"export: {destination} is not an earlier export (it has no {marker}), so it is not replaced: choose another directory")


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


def _export_adapter(adapter_dir: Path, found: str, model: str, destination: Path, dtype: str | None) -> None:
    import torch

    from swarmtune.adapters.adapter import load_adapter
    from swarmtune.skeleton import load_config

    adapter = load_adapter(load_config(model), adapter_dir, model)
    if dtype is not None:
        adapter.to(getattr(torch, dtype))
    adapter.save_pretrained(destination)
    count = sum(parameter.numel() for parameter in adapter.parameters())
    print(f"wrote {found} ({adapter_dir}) to {destination}: {count:,} parameters, loaded again by PEFT and equal")


def _export_merged(adapter_dir: Path, found: str, model: str, destination: Path, dtype: str | None) -> None:
    from swarmtune.adapters.adapter import load_adapter
    from swarmtune.skeleton import build_skeleton, load_config, stored_dtype

    config = load_config(model)
    load_adapter(config, adapter_dir, model)  # refuses an adapter that does not fit before the whole model is loaded
    parameters = sum(parameter.numel() for parameter in build_skeleton(config).parameters())
    size = {"float32": 4}.get(dtype, 2) if dtype else stored_dtype(config).itemsize
    print(f"merging loads the whole model: {parameters:,} parameters, about {_human(parameters * size)} of memory", flush=True)
    temporary = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
        change, rounding, tokenizer = _merge(adapter_dir, model, temporary, dtype or "auto")
        os.chmod(temporary, 0o755)
        _replace(temporary, destination)
    except OSError as error:
        raise UsageError(f"export: {destination} cannot be written: {error.strerror or ' '.join(str(error).split())[:300]}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    print(f"wrote {Path(model).name} with {found} ({adapter_dir}) merged in to {destination}, {tokenizer}")
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
        AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False).save_pretrained(target)
    except (OSError, ValueError, KeyError) as error:
        if Path(model).is_dir() and not list(Path(model).glob("*token*")):
            return change, rounding, "without a tokenizer, because the model has none"
        raise UsageError(f"export: the tokenizer of {model} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
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


def _replace(source: Path, target: Path) -> None:
    """Move a directory; a former one disappears only once the new one is in its place."""
    if not target.exists():
        source.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    target.rename(old / "former")
    source.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _human(size_bytes: float) -> str:
    unit = "bytes"
    for larger in ("KB", "MB", "GB", "TB"):
        if size_bytes < 1000:
            break
        size_bytes, unit = size_bytes / 1000, larger
    return f"{size_bytes:.1f} {unit}" if unit != "bytes" else f"{size_bytes:.0f} bytes"
