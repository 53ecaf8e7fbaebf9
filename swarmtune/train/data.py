"""The data of a run as a LightningDataModule: rows of text, conversations or labelled texts, for training and validation.

``sources`` reads, ``documents`` splits, ``prepare`` tokenises, ``cache`` keeps, ``forms``, ``chat`` and ``labels`` say what rows are, ``stream`` does
it all on the way, ``loader`` puts rows into batches that a resumed run can go on with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from swarmtune.errors import UsageError
from swarmtune.train.cache import TokenCache, default_folder, entry_key
from swarmtune.train.chat import ChatForm
from swarmtune.train.chat_template import TemplateChoice
from swarmtune.train.forms import Form, HeldRows, Rows, TextForm, pad_token
from swarmtune.train.labels import LabelForm
from swarmtune.train.loader import InOrder, ResumableLoader, RowBatches
from swarmtune.train.prepare import load_tokenizer, prepare, tokenizer_digest
from swarmtune.train.preparing import Preparing
from swarmtune.train.run_dir import CHAT_TEMPLATE, LABELS
from swarmtune.train.sources import SOURCE_KEYS, make_sources
from swarmtune.train.stream import StreamBatches, stream_rows
from swarmtune.train.windows import Batch

STREAM_VALIDATION_WINDOWS = 256
"""Rows of held-out text that are taken from a stream, if nothing else is said."""
SIDES = {"train": "training", "val": "validation"}


class TextDataModule(LightningDataModule):
    """Rows for training and validation.

    Args:
        tokenizer: a directory or hub id with the model's tokenizer.
        seed: seed of the order of training rows.
        format: what a row is: ``text``, ``chat`` or ``labels``.
        validation_fraction: share of the text that is held out, unless validation text is kept apart.
        validation_windows: how many rows of validation data at most.
        streaming: prepare nothing; read as training goes.
        shuffle_windows: of a stream, how many rows are mixed.
        sequence_length: T.
        batch_size: rows per batch.
        num_workers: processes that make training batches.
        cache: keep prepared tokens on disk.
        cache_dir: where.
        keys: what ``make_sources`` and ``make_form`` take; all keys are explained in ``swarmtune.data_schema.DataConfig``.
    """

    def __init__(
        self,
        tokenizer: str,
        *,
        seed: int = 0,
        format: str = "text",
        validation_fraction: float = 0.15,
        validation_windows: int | None = None,
        streaming: bool = False,
        shuffle_windows: int = 1024,
        sequence_length: int = 128,
        batch_size: int = 8,
        num_workers: int = 0,
        cache: bool = True,
        cache_dir: str | None = None,
        **keys: Any,
    ) -> None:
        super().__init__()
        self.tokenizer, self.seed = tokenizer, seed
        source_keys = {name: keys.pop(name) for name in SOURCE_KEYS if name in keys}
        self.train_source, self.val_source = make_sources(format=format, streaming=streaming, **source_keys)
        self.form = make_form(format, sequence_length, **keys)
        self.fraction, self.validation_windows = validation_fraction, validation_windows
        self.streaming, self.shuffle_windows = streaming, shuffle_windows
        self.sequence_length, self.batch_size, self.num_workers = sequence_length, batch_size, num_workers
        self.cache = TokenCache(Path(cache_dir) if cache_dir else default_folder()) if cache else None
        self._windows: dict[str, Rows] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read, split, tokenise and lay into rows, or take what is ready; once.

        Raises:
            UsageError: the data cannot be read, or there is too little of it.
        """
        if self._windows:
            return
        tokenizer, show = load_tokenizer(self.tokenizer), self._show()
        if self.streaming:
            found: dict[str, Rows] = {"val": self._held_out_of_stream(tokenizer, show)}
        else:
            tensors = self._prepared(tokenizer, show)
            limits = {"train": None, "val": self.validation_windows}
            found = {name: self.form.rows(tensors[name], SIDES[name], tokenizer, limits[name]) for name in tensors}
        for name, rows in found.items():
            if len(rows) == 0:
                raise UsageError(f"the data holds too little text: not even two tokens for {SIDES[name]}")
        self._windows = found

    def _prepared(self, tokenizer: Any, show: Preparing) -> dict[str, dict[str, Tensor]]:
        """The tensors of both sides, from the cache if they are there."""
        key, identity = None, tokenizer_digest(tokenizer)
        if self.cache is not None and identity is not None:
            with show.phase("looking for changes", "bytes") as advance:
                train = self.train_source.digest(advance)
                val = self.fraction if self.val_source is None else self.val_source.digest(advance)
            key = entry_key(train=train, val=val, tokenizer=identity, form=self.form.identity(tokenizer))
            if found := self.cache.load(key):
                return {side: {name.partition(".")[2]: found[name] for name in found if name.startswith(f"{side}.")} for side in SIDES}
        made = prepare(self.train_source, self.val_source, self.fraction, self.form, tokenizer, show)
        if key is not None and self.cache is not None:
            self.cache.save(key, {f"{side}.{name}": tensor for side, tensors in made.items() for name, tensor in tensors.items()})
        return made

    def _held_out_of_stream(self, tokenizer: Any, show: Preparing) -> Rows:
        """Validation rows of a stream, as many as are asked for."""
        most = self.validation_windows or STREAM_VALIDATION_WINDOWS
        source = self.val_source or self.train_source
        fraction = self.fraction if self.val_source is None else None
        found: list[Any] = []
        with show.phase("collecting held-out text", "rows", most) as advance:
            for row in stream_rows(source, fraction, True, self.form, tokenizer):
                found.append(row)
                advance(1)
                if len(found) == most:
                    break
        if not found:
            hint = "" if fraction is None else "; raise data.validation_fraction, or give data.validation_path"
            raise UsageError(f"no document of the stream fell to validation{hint}")
        return HeldRows(self.form, found, tokenizer)

    def _show(self) -> Preparing:
        """Where progress of preparing goes: where that of training goes."""
        from swarmtune.train.callbacks import ProgressDisplay

        for callback in getattr(self.trainer, "callbacks", []):
            if isinstance(callback, ProgressDisplay):
                return Preparing(callback.console, bar=callback.bar, line_every_s=callback.line_every_s)
        return Preparing()

    @property
    def windows(self) -> Mapping[str, Rows]:
        """The rows of ``train`` and ``val``; of a stream, those of ``val`` alone."""
        self.setup()
        return self._windows

    @property
    def labels(self) -> list[str]:
        """The names of the classes, in the order of a model's outputs.

        Raises:
            UsageError: the data are no labelled texts.
        """
        if not isinstance(self.form, LabelForm):
            raise UsageError("this recipe learns classes: it needs data.format=labels")
        if not self.form.names:
            self.setup()  # they are those of the training texts
        return self.form.names

    @property
    def pad_token(self) -> int:
        """The token that fills rows."""
        return pad_token(load_tokenizer(self.tokenizer))

    def companions(self) -> dict[str, str]:
        """Files that belong beside the trained adapter, as text by name: the chat template, or the names of the classes."""
        if isinstance(self.form, ChatForm):
            return {CHAT_TEMPLATE: self.form.template(load_tokenizer(self.tokenizer)).text}
        if isinstance(self.form, LabelForm):
            return {LABELS: json.dumps(self.labels, ensure_ascii=False) + "\n"}
        return {}

    def fingerprint(self) -> str:
        """A digest of what is trained on, in hex: of the exact rows, or, of a stream, of its settings and the names and sizes of its files.

        A run is resumed with data of the same fingerprint only.
        """
        if not self.streaming:
            said = self.windows["train"].identity()
        else:
            tokenizer = load_tokenizer(self.tokenizer)
            identity = tokenizer_digest(tokenizer) or self.tokenizer
            apart = None if self.val_source is None else self.val_source.names()
            said = [self.train_source.names(), apart, self.fraction, self.shuffle_windows, self.sequence_length, identity]
            said += self.form.identity(tokenizer)
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def train_dataloader(self) -> ResumableLoader:
        """Training batches, in an order that ``seed`` alone decides; they can be taken up again at any batch."""
        trainer = self.trainer
        trained = None if trainer is None else lambda: _trained(trainer)
        if not self.streaming:
            shuffle = not getattr(trainer, "overfit_batches", 0)
            batches = RowBatches(self.windows["train"], self.batch_size, self.seed, shuffle)
            return ResumableLoader(batches, num_workers=self.num_workers, trained=trained)
        fraction = self.fraction if self.val_source is None else None
        stream = StreamBatches(self.train_source, fraction, self.tokenizer, self.form, self.batch_size, self.seed, self.shuffle_windows)
        return ResumableLoader(stream, length=self._run_length(), num_workers=self.num_workers, trained=trained)

    def _run_length(self) -> int | None:
        """Batches of the whole run: to Lightning, a run over a stream is one epoch."""
        if self.trainer is None:
            return None
        if self.trainer.max_steps < 0:
            raise UsageError("data.streaming needs trainer.max_steps: a stream has no end")
        return max(self.trainer.max_steps, 1) * self.trainer.accumulate_grad_batches

    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation batches, always in the same order."""
        return DataLoader(InOrder(self.windows["val"], self.batch_size), batch_size=None, generator=torch.Generator())


def make_form(
    format: str,
    length: int,
    *,
    chat_template: str | None = None,
    chat_template_file: str | None = None,
    train_on: str = "completions",
    packing: str = "auto",
    too_long: str = "truncate",
    label_names: Sequence[str] | None = None,
) -> Form:
    """What rows of ``length`` tokens are. The keys are those of ``swarmtune.data_schema.DataConfig``.

    Conversations are packed for ``packing="always"`` alone: whether a model can keep them apart, ``swarmtune.train.packing`` finds out.
    """
    if format == "chat":
        template = TemplateChoice(chat_template, chat_template_file)
        return ChatForm(length, template, everything=train_on == "everything", packed=packing == "always", drop=too_long == "drop")
    if format == "labels":
        return LabelForm(length, list(label_names or []), drop=too_long == "drop")
    return TextForm(length)


def _trained(trainer: Trainer) -> int:
    """Batches of this epoch that have been trained; one that is under way is not counted."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(progress.processed)
