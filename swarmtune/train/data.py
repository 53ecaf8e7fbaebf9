"""Text for causal language models: read, split by document, tokenised, packed into windows.

Validation documents are chosen before anything is packed, so a window never mixes the two sides. The choice hangs on the text alone, never on
the seed or the order of files: runs with different seeds are comparable.
"""

from __future__ import annotations

import glob
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from swarmtune.errors import UsageError

IGNORED_LABEL = -100
"""The label that Hugging Face losses skip."""
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text", ".arrow": "arrow"}
"""File endings that can be read, and the reader of ``datasets`` for each."""
SHARED_PARAGRAPH_CHARS = 60
"""Two help topics that share a paragraph at least this long are kept on one side of the split."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text, and the key of those that must not be parted from it by the split."""

    text: str
    group: str


def python_topics() -> list[Document]:
    """The help topics of Python's own ``pydoc``; topics that quote each other share a group, so that nothing leaks."""
    from pydoc_data.topics import topics

    leader = {name: name for name in topics}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    first_with: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if len(words) >= SHARED_PARAGRAPH_CHARS:
                leader[find(name)] = find(first_with.setdefault(words, name))
    return [Document(topics[name], find(name)) for name in sorted(topics)]


def read_documents(path: str, text_column: str, split: str) -> list[Document]:
    """Every text of a local file, a directory, a saved dataset or a hub id; equal texts share a group.

    Raises:
        UsageError: nothing there, no such split or column, or a column that is not text.
    """
    import datasets

    try:
        found = _open_dataset(path, split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        raise UsageError(f"data {path}: {' '.join(str(root).split())[:300] or type(root).__name__}") from error
    if text_column not in found.column_names:
        raise UsageError(f"data {path}: there is no column {text_column!r}; there are: {', '.join(found.column_names)} (set data.text_column)")
    texts = [text for text in found[text_column] if text is not None]
    strange = next((text for text in texts if not isinstance(text, str)), None)
    if strange is not None:
        raise UsageError(f"data {path}: column {text_column!r} holds {type(strange).__name__}, not text")
    return [Document(text, text) for text in texts if text.strip()]


def _open_dataset(path: str, split: str) -> Any:
    """The ``datasets.Dataset`` at ``path``; raises whatever ``datasets`` raises."""
    import datasets

    local = Path(path)
    if local.is_dir() and any((local / name).exists() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
        found = datasets.load_from_disk(path)
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                raise UsageError(f"data {path}: there is no split {split!r}; there are: {', '.join(found)} (choose with data.split)")
            return found[split]
        return found
    if local.is_file() and not local.stat().st_size:
        raise UsageError(f"data {path}: the file is empty")
    if local.is_file():
        reader = READERS.get(local.suffix)
        if reader is None:
            raise UsageError(f"data {path}: a file must end in one of {', '.join(READERS)}")
        extra = {"sample_by": "paragraph"} if reader == "text" else {}
        return datasets.load_dataset(reader, data_files=glob.escape(path), split="train", **extra)
    return datasets.load_dataset(path, split=split)


def split_documents(documents: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Training and validation documents; about ``fraction`` of the characters are validation, by whole groups.

    Groups are taken in the order of a hash of their key while they fit.

    Raises:
        UsageError: fewer than two groups.
    """
    sizes: dict[str, int] = defaultdict(int)
    for document in documents:
        sizes[document.group] += len(document.text)
    if len(sizes) < 2:
        raise UsageError(f"at least two different documents are needed, one to train on and one to validate on; got {len(sizes)}")
    budget = fraction * sum(sizes.values())
    held_out: set[str] = set()
    for group in sorted(sizes, key=lambda key: hashlib.sha256(key.encode(errors="surrogatepass")).digest()):
        if sizes[group] <= budget and len(held_out) < len(sizes) - 1:
            held_out.add(group)
            budget -= sizes[group]
    held_out = held_out or {min(sizes, key=lambda key: (sizes[key], key))}
    return [item for item in documents if item.group not in held_out], [item for item in documents if item.group in held_out]


class Windows(Dataset[dict[str, Tensor]]):
    """Fixed windows of a token stream: ``input_ids``, ``attention_mask`` and ``labels``, each of shape (T,) in int64.

    Args:
        tokens: one token sequence per document.
        length: T.
        end: token put after each document, if the tokenizer has one.
        pad: token that fills the last window; masked, and ignored in the labels.
    """

    def __init__(self, tokens: Iterable[Sequence[int]], length: int, end: int | None, pad: int) -> None:
        stream = [token for document in tokens for token in (*document, *(() if end is None else (end,)))]
        if len(stream) % length == 1:
            stream.pop()  # alone in its window it has nothing to predict, and its loss would be 0 / 0
        missing = -len(stream) % length
        shape = (-1, length)
        self.input_ids_NT = torch.tensor(stream + [pad] * missing, dtype=torch.int64).view(shape)
        self.mask_NT = torch.tensor([1] * len(stream) + [0] * missing, dtype=torch.int64).view(shape)
        self.labels_NT = self.input_ids_NT.masked_fill(self.mask_NT == 0, IGNORED_LABEL)

    def __len__(self) -> int:
        return len(self.input_ids_NT)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids_NT[index], "attention_mask": self.mask_NT[index], "labels": self.labels_NT[index]}


def load_tokenizer(path: str) -> Any:
    """The model's own tokenizer.

    Raises:
        UsageError: the model has none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"model {path}: its tokenizer cannot be read: {' '.join(str(error).split())[:300]}") from error


class TextDataModule(LightningDataModule):
    """Windows of text for training and validation.

    Args:
        tokenizer: a directory or hub id with the model's tokenizer.
        source: ``python_topics`` or ``dataset``; the rest is explained in ``swarmtune.schema.DataConfig``.
        seed: seed of the order of training windows.
    """

    def __init__(
        self,
        tokenizer: str,
        *,
        source: str = "python_topics",
        path: str | None = None,
        text_column: str = "text",
        split: str = "train",
        validation_fraction: float = 0.15,
        sequence_length: int = 128,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizer, self.source, self.path = tokenizer, source, path
        self.text_column, self.split, self.validation_fraction = text_column, split, validation_fraction
        self.sequence_length, self.batch_size, self.num_workers, self.seed = sequence_length, batch_size, num_workers, seed
        self._windows: dict[str, Windows] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read, split, tokenise and pack; once."""
        if self._windows:
            return
        documents = python_topics() if self.source == "python_topics" else read_documents(self.path or "", self.text_column, self.split)
        tokenizer = load_tokenizer(self.tokenizer)
        for name, side in zip(("train", "val"), split_documents(documents, self.validation_fraction), strict=True):
            tokens = tokenizer([item.text for item in side], add_special_tokens=False, verbose=False)["input_ids"]
            self._windows[name] = self._pack(tokens, tokenizer)

    def _pack(self, tokens: list[list[int]], tokenizer: Any) -> Windows:
        end = tokenizer.eos_token_id
        pad = next((token for token in (tokenizer.pad_token_id, end) if token is not None), 0)
        windows = Windows(tokens, self.sequence_length, end, pad)
        if len(windows) == 0:
            raise UsageError("the data holds too little text: not even two tokens on one side of the split")
        return windows

    @property
    def windows(self) -> Mapping[str, Windows]:
        """The windows of ``train`` and ``val``."""
        self.setup()
        return self._windows

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Training batches, in an order that ``seed`` alone decides."""
        order = torch.Generator().manual_seed(self.seed)
        return self._loader("train", shuffle=True, generator=order)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Validation batches, always in the same order."""
        return self._loader("val")

    def _loader(self, name: str, **options: Any) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(self.windows[name], self.batch_size, num_workers=self.num_workers, **options)
