"""The data of a run as a LightningDataModule: windows of text for training and validation.

``sources`` reads, ``documents`` splits, ``prepare`` tokenises, ``cache`` keeps, ``windows`` cuts, ``stream`` does it all on the way, ``loader`` puts
windows into batches that a resumed run can go on with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from swarmtune.errors import UsageError
from swarmtune.train.cache import TokenCache, default_folder, entry_key, tokens_digest
from swarmtune.train.loader import ResumableLoader, WindowBatches
from swarmtune.train.prepare import load_tokenizer, pad_token, prepare, tokenizer_digest
from swarmtune.train.preparing import Preparing
from swarmtune.train.sources import make_sources
from swarmtune.train.stream import StreamBatches, stream_windows
from swarmtune.train.windows import Batch, Windows

STREAM_VALIDATION_WINDOWS = 256
"""Windows of held-out text that are taken from a stream, if nothing else is said."""


class TextDataModule(LightningDataModule):
    """Windows of text for training and validation.

    Args:
        tokenizer: a directory or hub id with the model's tokenizer.
        seed: seed of the order of training windows.
        validation_fraction: share of the text that is held out, unless validation text is kept apart.
        validation_windows: how many windows of validation text at most.
        streaming: prepare nothing; read as training goes.
        shuffle_windows: of a stream, how many windows are mixed.
        sequence_length: T.
        batch_size: windows per batch.
        num_workers: processes that make training batches.
        cache: keep prepared tokens on disk.
        cache_dir: where.
        source_keys: keys that ``make_sources`` takes; all are explained in ``swarmtune.schema.DataConfig``.
    """

    def __init__(
        self,
        tokenizer: str,
        *,
        seed: int = 0,
        validation_fraction: float = 0.15,
        validation_windows: int | None = None,
        streaming: bool = False,
        shuffle_windows: int = 1024,
        sequence_length: int = 128,
        batch_size: int = 8,
        num_workers: int = 0,
        cache: bool = True,
        cache_dir: str | None = None,
        **source_keys: Any,
    ) -> None:
        super().__init__()
        self.tokenizer, self.seed = tokenizer, seed
        self.train_source, self.val_source = make_sources(streaming=streaming, **source_keys)
        self.fraction, self.validation_windows = validation_fraction, validation_windows
        self.streaming, self.shuffle_windows = streaming, shuffle_windows
        self.sequence_length, self.batch_size, self.num_workers = sequence_length, batch_size, num_workers
        self.cache = TokenCache(Path(cache_dir) if cache_dir else default_folder()) if cache else None
        self._windows: dict[str, Windows] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read, split, tokenise and pack, or take what is ready; once.

        Raises:
            UsageError: the data cannot be read, or there is too little of it.
        """
        if self._windows:
            return
        tokenizer, show = load_tokenizer(self.tokenizer), self._show()
        tokens = self._held_out_of_stream(tokenizer, show) if self.streaming else self._prepared(tokenizer, show)
        pad = pad_token(tokenizer)
        limits = {"train": None, "val": self.validation_windows}
        found = {name: Windows(stream_M, self.sequence_length, pad, limits[name]) for name, stream_M in tokens.items()}
        for name, windows in found.items():
            if len(windows) == 0:
                side = "training" if name == "train" else "validation"
                raise UsageError(f"the data holds too little text: not even two tokens for {side}")
        self._windows = found

    def _prepared(self, tokenizer: Any, show: Preparing) -> dict[str, Tensor]:
        """Both streams of tokens, from the cache if they are there."""
        key, identity = None, tokenizer_digest(tokenizer)
        if self.cache is not None and identity is not None:
            with show.phase("looking for changes", "bytes") as advance:
                train = self.train_source.digest(advance)
                val = self.fraction if self.val_source is None else self.val_source.digest(advance)
            key = entry_key(train=train, val=val, tokenizer=identity)
            if found := self.cache.load(key):
                return found
        found = prepare(self.train_source, self.val_source, self.fraction, tokenizer, show)
        if key is not None and self.cache is not None:
            self.cache.save(key, found)
        return found

    def _held_out_of_stream(self, tokenizer: Any, show: Preparing) -> dict[str, Tensor]:
        """Validation tokens of a stream, as many as are asked for."""
        most = self.validation_windows or STREAM_VALIDATION_WINDOWS
        source = self.val_source or self.train_source
        fraction = self.fraction if self.val_source is None else None
        found: list[Tensor] = []
        with show.phase("collecting held-out text", "tokens", most * self.sequence_length) as advance:
            for tokens_S in stream_windows(source, fraction, True, tokenizer, self.sequence_length):
                found.append(tokens_S)
                advance(len(tokens_S))
                if len(found) == most:
                    break
        if not found:
            hint = "" if fraction is None else "; raise data.validation_fraction, or give data.validation_path"
            raise UsageError(f"no document of the stream fell to validation{hint}")
        return {"val": torch.cat(found)}

    def _show(self) -> Preparing:
        """Where progress of preparing goes: where that of training goes."""
        from swarmtune.train.callbacks import ProgressDisplay

        for callback in getattr(self.trainer, "callbacks", []):
            if isinstance(callback, ProgressDisplay):
                return Preparing(callback.console, bar=callback.bar, line_every_s=callback.line_every_s)
        return Preparing()

    @property
    def windows(self) -> Mapping[str, Windows]:
        """The windows of ``train`` and ``val``; of a stream, those of ``val`` alone."""
        self.setup()
        return self._windows

    def fingerprint(self) -> str:
        """A digest of what is trained on, in hex: of the exact windows, or, of a stream, of its settings and the names and sizes of its files.

        A run is resumed with data of the same fingerprint only.
        """
        if not self.streaming:
            train = self.windows["train"]
            said: list[Any] = [tokens_digest(train.tokens_M), train.length]
        else:
            identity = tokenizer_digest(load_tokenizer(self.tokenizer)) or self.tokenizer
            apart = None if self.val_source is None else self.val_source.names()
            said = [self.train_source.names(), apart, self.fraction, self.shuffle_windows, self.sequence_length, identity]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def train_dataloader(self) -> ResumableLoader:
        """Training batches, in an order that ``seed`` alone decides; they can be taken up again at any batch."""
        trainer = self.trainer
        trained = None if trainer is None else lambda: _trained(trainer)
        if not self.streaming:
            shuffle = not getattr(trainer, "overfit_batches", 0)
            batches = WindowBatches(self.windows["train"], self.batch_size, self.seed, shuffle)
            return ResumableLoader(batches, num_workers=self.num_workers, trained=trained)
        fraction = self.fraction if self.val_source is None else None
        stream = StreamBatches(self.train_source, fraction, self.tokenizer, self.sequence_length, self.batch_size, self.seed, self.shuffle_windows)
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
        return DataLoader(self.windows["val"], self.batch_size, generator=torch.Generator())


def _trained(trainer: Trainer) -> int:
    """Batches of this epoch that have been trained; one that is under way is not counted."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(progress.processed)
