"""Safetensors checkpoints, read tensor by tensor: a process opens only the shards that hold what it needs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from swarmtune.errors import ModelUnsupported, UsageError
from swarmtune.wire.tensors import tensor_bytes

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def local_path(model: str) -> Path | None:
    """``model`` as a directory, or ``None`` where it is a hub id.

    Raises:
        UsageError: it looks like a path, and there is no such directory.
    """
    path = Path(model).expanduser()
    if model.strip() and path.is_dir():
        return path.resolve()
    looks_local = path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1 or path.exists() or (os.sep != "/" and os.sep in model)
    if looks_local or not model.strip():
        raise UsageError(f"the model {model!r} is not a directory: give a directory with config.json and safetensors, or a hub id such as org/name")
    return None


class Checkpoint:
    """The stored tensors of a model, by the names under which they are stored.

    Attributes:
        opened: names of the shard files opened so far.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._directory = local_path(model)
        self.opened: set[str] = set()
        self._shard_of = self._read_index()

    def keys(self) -> Set[str]:
        """The names of all stored tensors, as they are stored."""
        return self._shard_of.keys()

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield stored tensors shard by shard, as they are on disk.

        Raises:
            ModelUnsupported: a shard cannot be read.
        """
        by_shard: dict[str, list[str]] = {}
        for key in keys:
            by_shard.setdefault(self._shard_of[key], []).append(key)
        for shard, names in sorted(by_shard.items()):
            path = self._fetch(shard)
            if path is None:
                raise ModelUnsupported(f"the model {self._model!r} lacks its shard {shard}")
            self.opened.add(shard)
            try:
                with safe_open(path, framework="pt") as file:
                    for name in sorted(names):
                        yield name, file.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise ModelUnsupported(f"{path} is not a whole safetensors file: {error}") from error

    def on_disk(self, keys: Iterable[str]) -> bool:
        """Whether all these stored tensors can be read without a download."""
        return all(self._fetch(shard, download=False) is not None for shard in {self._shard_of[key] for key in keys})

    def _read_index(self) -> dict[str, str]:
        index = self._fetch(INDEX)
        if index is not None:
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
                found = {str(key): str(shard) for key, shard in weight_map.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelUnsupported(f"{index} is not an index of safetensors shards") from error
            for shard in set(found.values()):
                if Path(shard).is_absolute() or ".." in Path(shard).parts:
                    raise ModelUnsupported(f"{index} names a shard outside of the model: {shard[:200]!r}")
            return found
        single = self._fetch(SINGLE)
        if single is None:
            raise ModelUnsupported(f"the model {self._model!r} has neither {SINGLE} nor {INDEX}: convert it to safetensors")
        try:
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), SINGLE)
        except (SafetensorError, OSError) as error:
            raise ModelUnsupported(f"{single} is not a whole safetensors file: {error}") from error

    def _fetch(self, name: str, download: bool = True) -> Path | None:
        """A file of the model on this disk, downloaded first where the model is a hub id and that is allowed; ``None`` where there is none."""
        if self._directory is not None:
            path = self._directory / name
            return path if path.is_file() else None
        from transformers.utils.hub import cached_file

        found = cached_file(
            self._model,
            name,
            local_files_only=not download,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return Path(found) if found else None


def block_names(layer: nn.Module, prefix: str, block: int) -> dict[str, str]:
    """The stored tensors of a block: name within the block to the full name in the library's model."""
    return {name: f"{prefix}{block}.{name}" for name in layer.state_dict()}


def all_finite(value: Tensor) -> bool:
    """Whether no element is NaN or infinite: the extremes tell, in a pass much shorter than that of a digest."""
    return not value.is_floating_point() or not value.numel() or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(value))


def tensor_digest(tensor: Tensor) -> bytes:
    """SHA-256 of a stored tensor: type, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor_bytes(tensor))
    return digest.digest()


def block_digest(digests: Mapping[str, bytes]) -> str:
    """Sixteen hexadecimal digits for one block, from the digests of its tensors by their names within the block."""
    whole = hashlib.sha256()
    for name, digest in sorted(digests.items()):
        whole.update(name.encode() + b"\0" + digest)
    return whole.hexdigest()[:16]
