"""Checkpoints from which a run goes on as if it had never stopped: bitwise the same adapter.

Each is a directory ``step=N`` with the state of the Trainer (what learns, optimizer, scheduler, loops, position in the data, random generators), a
PEFT directory, and a manifest with the digest of every file. It appears under its name when it is whole. What is saved is always the state
between two optimizer steps, so that a run broken off in the middle of a step repeats that step.
"""

from __future__ import annotations

import copy
import logging
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from safetensors import SafetensorError

from swarmtune.errors import NonFinite, UsageError
from swarmtune.files import write_json, write_text
from swarmtune.train.run_dir import ADAPTER
from swarmtune.train.saved_state import MANIFEST, STATE, file_digest, step_folders

logger = logging.getLogger(__name__)

KEY = "swarmtune"
"""Where our part stands in the Trainer's state."""
_WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, UsageError)
"""What torch, safetensors and an adapter that saves itself raise when a disk is full, besides what the system says."""


class AdapterCheckpoint(Checkpoint):
    """Saves a checkpoint every ``every_steps`` optimizer steps, at the end, and when training is broken off; the newest ``keep`` stay.

    Nothing is saved after a loss or gradient that is not finite, nor where an exception came in the middle of an optimizer's step. A disk that is
    full costs that checkpoint, not the run; the ones before stay whole.

    Args:
        directory: where the ``step=N`` directories are made.
        every_steps: optimizer steps between two.
        keep: how many stay; -1 for all.
        facts: what must be the same when the run goes on, such as digests of data and model; see ``check_facts``.
        companions: files that belong beside the adapter, as text by name.
    """

    def __init__(
        self,
        directory: Path,
        every_steps: int,
        keep: int = -1,
        facts: Mapping[str, Any] | None = None,
        companions: Mapping[str, str] | None = None,
    ) -> None:
        self.directory, self.every_steps, self.keep = directory, every_steps, keep
        self.companions = dict(companions or {})
        self.facts = dict(facts or {})
        self._saved_step = 0
        self._stepping = False
        self._boundary: dict[str, Any] = {}
        self._restored: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count where training begins; after a resume, with the batch after the last one that was trained."""
        self._saved_step = trainer.global_step
        self._stepping, self._boundary = False, {}
        position = (self._restored or {}).get("loader")
        if position is not None:  # Lightning forgets it where the length of an epoch was asked for before
            cast(Any, trainer.train_dataloader).load_state_dict(position)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """After a resume: the random generators go on where they were; everything since then was preparation."""
        if self._restored is not None:
            restore_rng(self._restored["rng"])
            self._restored = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """From here to the end of the batch, what learns may be half changed."""
        self._stepping = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Remember where a step ended; save when a multiple of ``every_steps`` is reached."""
        step = trainer.global_step
        if step == self._boundary.get("step", self._saved_step):
            return
        loader = cast(Any, trainer.train_dataloader)
        # A signal may come at any moment: what belongs together is put in place by one assignment.
        self._boundary = {
            "step": step,
            "loops": copy.deepcopy(trainer.fit_loop.state_dict()),
            "callbacks": {each.state_key: copy.deepcopy(each.state_dict()) for each in trainer.callbacks if each is not self},  # type: ignore[attr-defined]
            "rng": rng_state(),
            "loader": loader.state_dict() if hasattr(loader, "load_state_dict") else None,
        }
        self._stepping = False
        if step % self.every_steps == 0:
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end."""
        self.save(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what there is."""
        if not isinstance(exception, NonFinite) and not self._stepping:
            self.save(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the loops and the random generators as they were between two steps."""
        if self._boundary:
            checkpoint["loops"]["fit_loop"] = self._boundary["loops"]
            checkpoint["callbacks"] = {key: state for key, state in self._boundary["callbacks"].items() if state}
            checkpoint[KEY] = {"rng": self._boundary["rng"], "loader": self._boundary["loader"], "facts": self.facts}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the random generators' states, for the moment when training goes on.

        Raises:
            UsageError: data or model are not what they were.
        """
        ours = checkpoint.get(KEY, {})
        check_facts(ours.get("facts", {}), self.facts)
        self._restored = ours if "rng" in ours else None

    def save(self, trainer: Trainer, pl_module: Any) -> None:
        """Write a checkpoint of the last finished step, unless that has been done."""
        step = self._boundary.get("step", self._saved_step)
        if step == self._saved_step or getattr(trainer, "fast_dev_run", False):
            return
        folder, partial = self.directory / f"step={step}", self.directory / f".step={step}.partial"
        for each in trainer.loggers:
            each.save()
        try:
            shutil.rmtree(partial, ignore_errors=True)
            trainer.save_checkpoint(partial / STATE)
            save_adapter(pl_module, partial / ADAPTER, self.companions)
            files = sorted(path for path in partial.rglob("*") if path.is_file())
            write_json(partial / MANIFEST, {"step": step, "files": {str(path.relative_to(partial)): file_digest(path) for path in files}})
            for path in files:
                _sync(path)
            _replace(partial, folder)
        except _WRITE_ERRORS as error:
            shutil.rmtree(partial, ignore_errors=True)
            last = f"the one of step {self._saved_step} stays" if self._saved_step else "there is none yet"
            logger.warning("the checkpoint of step %d could not be written (%s): %s", step, " ".join(str(error).split())[:200], last)
            return
        self._saved_step = step
        self._prune()

    def _prune(self) -> None:
        """Keep the newest; later ones than the one just saved are damaged ones that were passed over."""
        folders = step_folders(self.directory)
        end = folders.index(self.directory / f"step={self._saved_step}") + 1
        for old in folders[end:] + (folders[: max(0, end - self.keep)] if self.keep > 0 else []):
            shutil.rmtree(old, ignore_errors=True)


def save_adapter(module: Any, folder: Path, companions: Mapping[str, str]) -> None:
    """Write the adapter of ``module.model``, and the files that belong beside it."""
    module.model.adapter.save_pretrained(folder)
    for name, text in companions.items():
        write_text(folder / name, text)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(partial: Path, folder: Path) -> None:
    """Give a whole directory its name; an older one of that name, from before a damaged checkpoint was passed over, goes."""
    _sync(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)
    _sync(folder.parent)


def check_facts(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare what a checkpoint was made with and what is there now.

    Raises:
        UsageError: the recipe, the data, the model, its weights or their precision changed.
    """
    names = {
        "mode": "the precision of the servers is",
        "recipe": "the recipe's code is",
        "data": "the training data are",
        "model": "the model's configuration is",
        "weights": "the servers' weights are",
    }
    for key, noun in names.items():
        if key in saved and key in now and saved[key] != now[key]:
            raise UsageError(f"resume: {noun} not what this run began with, so it cannot go on as if nothing had happened: start a new run")
    if saved.get("numeric") != now.get("numeric"):
        logger.warning("the servers compute in another numeric class than before: the rest of the run can differ in the last digits")


def rng_state() -> dict[str, Any]:
    """The states of the random generators of Python, NumPy and torch, as plain values and tensors."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(name), torch.from_numpy(numpy.asarray(keys).astype("int64")), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Set the random generators to what ``rng_state`` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
