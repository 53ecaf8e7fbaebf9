"""Safetensors checkpoints, read tensor by tensor: a process opens only the shards that hold what it needs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    """The tensors of a model, by their names in the library's modules.

    Attributes:
        opened: names of the shard files opened so far.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._directory = local_path(model)
        self.opened: set[str] = set()
        self._shard_of = self._read_index()

    def find(self, name: str, base_prefix: str) -> str | None:
        """The stored key of the module parameter ``name``: as it is, or with or without the base model's prefix."""
        candidates = (name, name.removeprefix(f"{base_prefix}."), f"{base_prefix}.{name}")
        return next((key for key in candidates if key in self._shard_of), None)

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


def fill(
    module: nn.Module,
    stored_names: Mapping[str, str],
    checkpoint: Checkpoint,
    base_prefix: str,
    dtype: torch.dtype,
    device: torch.device,
    observe: Callable[[str, Tensor], None] | None = None,
) -> None:
    """Give parameters and persistent buffers of ``module`` their stored values, cast to ``dtype``.

    Args:
        module: on the meta device; its tensors are replaced.
        stored_names: name in ``module`` to the full name in the library's model.
        checkpoint: where the values are.
        base_prefix: the library's ``base_model_prefix``.
        dtype: of the floating-point values.
        device: where the values go.
        observe: called with each name in ``module`` and its tensor as stored.

    Raises:
        ModelUnsupported: a tensor is missing, has another shape, or holds a weight that is not finite in ``dtype``.
    """
    names_of: dict[str, list[str]] = {}
    for name, full_name in stored_names.items():
        key = checkpoint.find(full_name, base_prefix)
        if key is None:
            raise ModelUnsupported(
                f"the checkpoint has no tensor {full_name}: it is incomplete, or needs a conversion by the library that spans do not do"
            )
        names_of.setdefault(key, []).append(name)
    for key, tensor in checkpoint.read(names_of):
        for name in names_of[key]:
            if observe is not None:
                observe(name, tensor)
            _assign(module, name, tensor, key, dtype, device)


def _assign(module: nn.Module, name: str, tensor: Tensor, key: str, dtype: torch.dtype, device: torch.device) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    expected = getattr(owner, leaf)
    if expected.shape != tensor.shape:
        raise ModelUnsupported(f"the checkpoint's {key} has shape {tuple(tensor.shape)}, the configuration asks for {tuple(expected.shape)}")
    value = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None, copy=True)
    if isinstance(expected, nn.Parameter):
        if not _all_finite(value):
            raise ModelUnsupported(
                f"the checkpoint's {key} holds NaN or infinity in {str(value.dtype).removeprefix('torch.')}: it is damaged, or needs another dtype"
            )
        setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
    else:
        owner.register_buffer(leaf, value)


def block_names(layer: nn.Module, prefix: str, block: int) -> dict[str, str]:
    """The stored tensors of a block: name within the block to the full name in the library's model."""
    return {name: f"{prefix}{block}.{name}" for name in layer.state_dict()}


def stored_digest(names: Mapping[str, str], checkpoint: Checkpoint, base_prefix: str) -> tuple[str, int] | None:
    """The digest of a block (see ``block_names``) and the bytes read for it; ``None`` where not all of it is on this disk: nothing is downloaded.

    Raises:
        ModelUnsupported: a shard cannot be read.
    """
    names_of: dict[str, list[str]] = {}
    for name, full_name in names.items():
        key = checkpoint.find(full_name, base_prefix)
        if key is None:
            return None
        names_of.setdefault(key, []).append(name)
    if not checkpoint.on_disk(names_of):
        return None
    digests, read_bytes = {}, 0
    for key, tensor in checkpoint.read(names_of):
        read_bytes += tensor.nbytes
        digests.update(dict.fromkeys(names_of[key], tensor_digest(tensor)))
    return block_digest(digests), read_bytes


def _all_finite(value: Tensor) -> bool:
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
