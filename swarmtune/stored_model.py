"""A checkpoint's tensors under the names of the library's modules, after the library's own renaming and conversion.

What is stored need not be what the modules hold: experts are stored one by one and held as one tensor, and names change between versions of the
library. The rules for that are the library's; here they are applied to the tensors of a few blocks only.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from swarmtune.errors import ModelUnsupported
from swarmtune.weights import Checkpoint, all_finite, block_digest, tensor_digest

Observer = Callable[[str, Tensor], None]


@dataclass(frozen=True, slots=True)
class Part:
    """Stored tensors that become tensors of the model together.

    Attributes:
        names: what they become.
        sources: stored key to the pattern of the converter that it matched, in the library's order.
        converter: what turns them into the named ones; ``None`` where there is one of each, and it stays as it is.
    """

    names: tuple[str, ...]
    sources: dict[str, str]
    converter: WeightConverter | None


class StoredModel:
    """The tensors of a model by their names in its modules.

    ``model`` must be whole, layers included, when this is made: its names decide how stored keys are read.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        self._model, self.checkpoint = model, checkpoint
        self._parts = _parts(model, checkpoint.keys())

    def lacks(self, names: Iterable[str]) -> str | None:
        """The first of ``names`` that no stored tensor becomes; ``None`` where all are there."""
        return next((name for name in names if name not in self._parts), None)

    def on_disk(self, names: Iterable[str]) -> bool:
        """Whether all that ``names`` are made of can be read without a download."""
        return self.checkpoint.on_disk({key for name in names for key in self._parts[name].sources})

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield the named tensors in the type in which they are stored, shard by shard; what is converted comes once all its sources are read.

        Raises:
            ModelUnsupported: a shard cannot be read, or the stored tensors do not fit together.
        """
        wanted = set(names)
        parts = {key: part for name in sorted(wanted) for part in (self._parts[name],) for key in part.sources}
        pending: dict[int, dict[str, Tensor]] = {}
        for key, tensor in self.checkpoint.read(parts):
            part = parts[key]
            if part.converter is None:
                found = dict.fromkeys(part.names, tensor)
            else:
                gathered = pending.setdefault(id(part), {})
                gathered[key] = tensor
                if len(gathered) < len(part.sources):
                    continue
                found = self._convert(part, pending.pop(id(part)))
            yield from ((name, value) for name, value in found.items() if name in wanted)

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The type in which a floating-point tensor is held where its module was made in ``dtype``: the library keeps some in float32."""
        kept = set(self._model._keep_in_fp32_modules_strict or ()) if dtype in (torch.float16, torch.bfloat16) else set()
        if dtype is torch.float16:
            kept |= set(self._model._keep_in_fp32_modules or ())
        return torch.float32 if any(re.search(pattern.replace("*", ".*"), name) for pattern in kept) else dtype

    def _convert(self, part: Part, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert part.converter is not None, "only converted parts are gathered"
        converter, first = copy.deepcopy(part.converter), part.names[0]
        for key, pattern in part.sources.items():
            converter.add_tensor(first, key, pattern, cast(Any, tensors[key]))  # the library does so when it saves
        try:
            made = converter.convert(first, model=self._model, config=self._model.config)
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ModelUnsupported(f"the checkpoint's tensors for {first} do not fit together: {str(error).splitlines()[0][:200]}") from error
        found = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        if missing := [name for name in part.names if name not in found]:
            raise ModelUnsupported(f"the library's conversion of the checkpoint gives no {missing[0]}")
        return found


def _parts(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, Part]:
    """The parts of a checkpoint with these keys, by each name that they become; keys that become nothing in ``model`` are left out."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    held = model.state_dict()
    parts: dict[str, Part] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, held)
        if name not in held and key in held:
            name, pattern = key, None
        if name not in held:
            continue
        if pattern is None:
            parts.setdefault(name, Part((name,), {key: key}, None))
            continue
        converter = of_pattern[pattern]
        targets = converter.target_patterns
        part = parts.setdefault(name, Part(tuple(name.replace(targets[0], target) for target in targets), {}, converter))
        if part.converter is converter:
            part.sources[key] = pattern
        for other in part.names:
            parts.setdefault(other, part)
    return parts


def fill(module: nn.Module, names: Mapping[str, str], stored: StoredModel, device: torch.device, observe: Observer | None = None) -> None:
    """Give parameters and persistent buffers of ``module`` their stored values, in the types in which the library would load them.

    Args:
        module: on the meta device, in the wanted type (see ``skeleton.in_dtype``); its tensors are replaced.
        names: name in ``module`` to the full name in the library's model.
        stored: where the values are.
        device: where the values go.
        observe: called with each name in ``module`` and its tensor in the type in which it is stored.

    Raises:
        ModelUnsupported: a tensor is missing, has another shape, or holds a weight that is not finite in its type.
    """
    missing = stored.lacks(names.values())
    if missing is not None:
        raise ModelUnsupported(f"the checkpoint has no tensor {missing}: it is incomplete, or needs a conversion that the library does not do")
    within = {full_name: name for name, full_name in names.items()}
    for full_name, tensor in stored.read(within):
        if observe is not None:
            observe(within[full_name], tensor)
        _assign(module, within[full_name], tensor, full_name, stored, device)


def _assign(module: nn.Module, name: str, tensor: Tensor, full_name: str, stored: StoredModel, device: torch.device) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    expected = getattr(owner, leaf)
    if expected.shape != tensor.shape:
        raise ModelUnsupported(f"the checkpoint's {full_name} has shape {tuple(tensor.shape)}, the configuration asks for {tuple(expected.shape)}")
    if tensor.is_floating_point() and tensor.dtype.itemsize < 2:
        raise ModelUnsupported(f"the checkpoint's {full_name} is stored in {tensor.dtype}, whose scales spans do not apply: use weights in bfloat16")
    dtype = stored.dtype_of(full_name, expected.dtype) if tensor.is_floating_point() else None
    value = tensor.to(device=device, dtype=dtype, copy=True)
    if isinstance(expected, nn.Parameter):
        if not all_finite(value):
            raise ModelUnsupported(
                f"the checkpoint's {full_name} holds NaN or infinity in {str(dtype).removeprefix('torch.')}: it is damaged, or needs another dtype"
            )
        setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
    else:
        owner.register_buffer(leaf, value)


def stored_digest(names: Mapping[str, str], stored: StoredModel) -> tuple[str, int] | None:
    """The digest of a block (see ``block_names``) and the bytes read for it; ``None`` where not all of it is on this disk: nothing is downloaded.

    Raises:
        ModelUnsupported: a shard cannot be read.
    """
    if stored.lacks(names.values()) is not None or not stored.on_disk(names.values()):
        return None
    within = {full_name: name for name, full_name in names.items()}
    digests, read_bytes = {}, 0
    for full_name, tensor in stored.read(within):
        read_bytes += tensor.nbytes
        digests[within[full_name]] = tensor_digest(tensor)
    return block_digest(digests), read_bytes
