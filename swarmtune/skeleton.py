"""A Hugging Face decoder on the meta device, and the cuts that both halves make in it.

No architecture is known by name here: the library's own modules and forward run, with fewer layers. What makes that right is checked by
``check_identity``: with no layers at all, the parent must return its input to the bit.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from swarmtune.errors import ModelUnsupported, UsageError
from swarmtune.model_files import why_unreadable
from swarmtune.types import BlockSpan
from swarmtune.weights import local_path
from swarmtune.wire.frames import dump_json

VOLATILE_KEYS = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures", "_attn_implementation"})
"""Keys of a config.json that do not change what the model computes."""


@dataclass(frozen=True, slots=True)
class LayerSite:
    """Where a model keeps its layers.

    Attributes:
        parent_name: dotted name of the module that loops over the layers, such as ``transformer``.
        attribute: name of its layer list, such as ``h``.
        num_blocks: how many layers there are.
        returns_tuple: whether the parent expects a layer to return a tuple; known after ``check_identity``.
    """

    parent_name: str
    attribute: str
    num_blocks: int
    returns_tuple: bool = False

    @property
    def prefix(self) -> str:
        """What the dotted names of all blocks begin with, such as ``transformer.h.``, its last dot included."""
        return f"{self.parent_name}.{self.attribute}."

    def split(self, name: str) -> tuple[int, str] | None:
        """Block number and name within the block of a full dotted name; ``None`` outside the blocks."""
        if not name.startswith(self.prefix):
            return None
        block, _, rest = name[len(self.prefix) :].partition(".")
        return int(block), rest


class ZeroPositions(nn.Module):
    """Stands in for a table of learned positions: the client has already added them."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """A scalar zero, whatever is asked."""
        return torch.zeros(())


class Absent(nn.Module):
    """Stands in for the token embedding of a span, which must never be used."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Raise: a span starts from hidden states."""
        raise ModelUnsupported("a span was asked to embed tokens")


def load_config(model: str) -> PretrainedConfig:
    """The configuration of a local directory or a hub id.

    Raises:
        UsageError: there is no such directory, or no readable configuration in it.
    """
    path = local_path(model)
    try:
        return AutoConfig.from_pretrained(path or model, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise UsageError(f"the model {model!r} has no readable config.json: {why_unreadable(error)}") from error


def config_digest(config: PretrainedConfig) -> str:
    """Sixteen hexadecimal digits that name what the model is, whatever its path, stored dtype and library version."""
    fields = {key: value for key, value in config.to_dict().items() if key not in VOLATILE_KEYS}
    return hashlib.sha256(dump_json(fields)).hexdigest()[:16]


HEADS: Mapping[str, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "sequence_classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
}
"""What may stand behind the body, and the library's class that builds a model with it."""


def build_skeleton(config: PretrainedConfig, head: str = "causal_lm") -> PreTrainedModel:
    """The whole model with a head (``...ForCausalLM``) on the meta device: structure and names, no memory.

    Raises:
        ModelUnsupported: the library has no causal language model for this configuration.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = HEADS[head].from_config(copy.deepcopy(config), trust_remote_code=False)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        what = {"causal_lm": "causal language model"}.get(head, f"model for {head.replace('_', ' ')}")
        raise ModelUnsupported(f"no {what} can be built from a {config.model_type!r} configuration: {str(error)[:300]}") from error
    return model.eval().requires_grad_(False)


def find_layers(model: PreTrainedModel) -> LayerSite:
    """The only list of decoder layers in ``model``.

    Raises:
        ModelUnsupported: there is none, or there are several.
    """
    sites = [
        LayerSite(name.rpartition(".")[0], name.rpartition(".")[2], len(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    if len(sites) != 1 or not sites[0].parent_name:
        found = ", ".join(site.prefix for site in sites) or "none"
        raise ModelUnsupported(f"expected one list of decoder layers in {type(model).__name__}, found {found}")
    return sites[0]


def truncate(model: PreTrainedModel, site: LayerSite, start: int, stop: int) -> nn.Module:
    """Cut ``model`` (consumed) down to the module that loops over its layers, with layers ``start:stop`` and neutral ends.

    The result maps ``inputs_embeds`` to the output of the last layer kept. ``start == stop`` keeps no layer.
    """
    parent = model.get_submodule(site.parent_name)
    layers = getattr(parent, site.attribute)
    kept = nn.ModuleList(layers[start:stop])
    _neutralise(parent, site)
    setattr(parent, site.attribute, kept)
    full: Any = parent.config
    _use_config(parent, _slice_config(full, start, stop, site.num_blocks))
    for module in parent.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx -= start  # type: ignore[operator, assignment]
    return parent.eval().requires_grad_(False)


def _use_config(parent: nn.Module, config: PretrainedConfig) -> None:
    """Put ``config`` in the place of the one that ``parent`` shares with its modules."""
    former = parent.config
    for module in parent.modules():
        if getattr(module, "config", None) is former:
            module.config = config  # type: ignore[assignment]


def _neutralise(parent: nn.Module, site: LayerSite) -> None:
    """Replace the stem and the final norm; what has no parameters (rotary tables) stays."""
    embedding = parent.get_input_embeddings() if isinstance(parent, PreTrainedModel) else None
    for name, child in list(parent.named_children()):
        if name == site.attribute or next(child.parameters(), None) is None:
            continue
        if child is embedding:
            setattr(parent, name, Absent())
        elif isinstance(child, nn.Embedding):
            setattr(parent, name, ZeroPositions())
        else:
            setattr(parent, name, nn.Identity())


def _slice_config(config: PretrainedConfig, start: int, stop: int, num_blocks: int) -> PretrainedConfig:
    """A copy for ``stop - start`` layers: the count, and every list with one entry per layer."""
    sliced = copy.deepcopy(config)
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == num_blocks and key != "architectures":
            setattr(sliced, key, value[start:stop])
    sliced.num_hidden_layers = stop - start
    sliced.use_cache = False
    return sliced


def init_buffers(model: nn.Module, owner: PreTrainedModel, device: torch.device | str = "cpu", skip: Container[int] = ()) -> None:
    """Give the buffers that were built on the meta device (rotary tables) their values, by the library's own initialisation.

    Args:
        model: whose buffers.
        owner: the library's model, which knows how.
        device: where they go.
        skip: ids of buffers that get their values elsewhere.

    Raises:
        ModelUnsupported: a buffer stays without a value.
    """
    for module in model.modules():
        pending = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta and id(buffer) not in skip]
        if not pending:
            continue
        for name in pending:
            empty = torch.empty_like(module.get_buffer(name), device=device)
            module._buffers[name] = empty.fill_(float("nan")) if empty.is_floating_point() else empty.zero_()
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # loaded values stay: the library skips what it believes done
        owner._init_weights(module)
        for name in pending:
            buffer = module.get_buffer(name)
            if buffer.is_floating_point() and not bool(torch.isfinite(buffer).all()):
                raise ModelUnsupported(f"the library gives no value to {type(module).__name__}.{name}")


def call_span(parent: nn.Module, hidden_BTH: Tensor, **arguments: Any) -> Tensor:
    """Run a truncated parent on hidden states."""
    output: Tensor = parent(inputs_embeds=hidden_BTH, use_cache=False, return_dict=True, **arguments).last_hidden_state
    return output


class _Echo(nn.Module):
    """A layer that returns its input, bare or in a tuple."""

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple

    def forward(self, hidden_BTH: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        """Do nothing."""
        return (hidden_BTH,) if self.returns_tuple else hidden_BTH


def check_identity(config: PretrainedConfig) -> LayerSite:
    """Make sure that spans of this model add up to the model: a span of no layers must return its input to the bit.

    Also finds out in which form the parent expects a layer's output.

    Raises:
        ModelUnsupported: it does not, so something outside the layers would run once per span.
    """
    model = build_skeleton(config)
    site = find_layers(model)
    full: Any = model.get_submodule(site.parent_name).config
    parent = truncate(model, site, 0, 0)
    if any(getattr(module, "rope_type", None) == "dynamic" for module in parent.modules()):
        raise ModelUnsupported(f"{type(model).__name__} uses dynamic rotary scaling, which depends on earlier calls: use another rope_type")
    init_buffers(parent, model)
    if not _echoes(parent, site, []):
        raise ModelUnsupported(
            f"{type(model).__name__} changes hidden states outside its layers (a span of zero layers is not the identity), "
            "so it cannot be cut into spans exactly: use a model that passes this check"
        )
    _use_config(parent, _slice_config(full, 0, 1, site.num_blocks))
    for returns_tuple in (False, True):
        if _echoes(parent, site, [_Echo(returns_tuple)]):
            return replace(site, returns_tuple=returns_tuple)
    raise ModelUnsupported(f"{type(model).__name__} does not take the output of a stand-in layer: use another model")


def _echoes(parent: nn.Module, site: LayerSite, layers: list[nn.Module]) -> bool:
    """Whether ``parent`` over ``layers`` returns its input, with and without a mask."""
    setattr(parent, site.attribute, nn.ModuleList(layers))
    generator = torch.Generator().manual_seed(0)
    hidden_BTH = torch.randn(2, 5, hidden_size(cast(PretrainedConfig, parent.config)), generator=generator)
    mask_BT = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    try:
        with torch.no_grad():
            outputs = [call_span(parent, hidden_BTH.clone(), attention_mask=mask) for mask in (None, mask_BT)]
    except (TypeError, RuntimeError, AttributeError, IndexError, ValueError, KeyError):
        return False
    return all(isinstance(output, Tensor) and torch.equal(output, hidden_BTH) for output in outputs)


def hidden_size(config: PretrainedConfig) -> int:
    """Width of the hidden states between blocks."""
    return int(config.get_text_config().hidden_size)


def stored_dtype(config: PretrainedConfig) -> torch.dtype:
    """The type in which the weights are stored, as the configuration says; float32 where it does not."""
    dtype = config.dtype
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def check_span(span: BlockSpan, num_blocks: int) -> BlockSpan:
    """``span``, when the model has these blocks.

    Raises:
        UsageError: it reaches outside.
    """
    if span.stop > num_blocks:
        raise UsageError(f"blocks {span} reach outside the model, which has blocks 0:{num_blocks}")
    return span
