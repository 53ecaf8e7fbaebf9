"""A Hugging Face decoder on the meta device, and the cuts that both halves make in it.

No architecture is known by name here (``repairs.py`` has the few values that a family needs): the library's own modules and forward run, with
fewer layers. What makes that right is checked by ``check_identity``: with no layers at all, the parent must return its input to the bit, and in
spans it must give each layer what it gives it in the whole model.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

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
from swarmtune.probe import StandIn, carrier, first_difference
from swarmtune.repairs import neutralise
from swarmtune.types import BlockSpan
from swarmtune.weights import local_path
from swarmtune.wire.frames import dump_json

Head = Literal["causal_lm", "sequence_classification", "token_classification"]
HEADS: Mapping[Head, tuple[str, Any]] = {
    "causal_lm": ("causal language model", AutoModelForCausalLM),
    "sequence_classification": ("sequence classifier", AutoModelForSequenceClassification),
    "token_classification": ("token classifier", AutoModelForTokenClassification),
}
"""What a head is called, and the library's factory of models with it."""

VOLATILE_KEYS = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures", "_attn_implementation"})
"""Keys of a config.json that do not change what the model computes."""


@dataclass(frozen=True, slots=True)
class LayerSite:
    """Where a model keeps its layers.

    Attributes:
        parent_name: dotted name of the module that loops over the layers, such as ``transformer``.
        attribute: name of its layer list, such as ``h``.
        num_blocks: how many layers there are.
        marks: per layer, what it says of itself in words, which the parent may read to choose its mask.
        output_items: how many items the tuple has that the parent expects of a layer, 0 for bare hidden states; known after ``check_identity``.
    """

    parent_name: str
    attribute: str
    num_blocks: int
    marks: tuple[Mapping[str, str], ...] = ()
    output_items: int = 0

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
    fields = {key: _finite(value) for key, value in config.to_dict().items() if key not in VOLATILE_KEYS}
    return hashlib.sha256(dump_json(fields)).hexdigest()[:16]


def _finite(value: Any) -> Any:
    """``value`` as JSON can hold it: infinities, with which Mamba's configurations say that there is no limit, become words."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def in_dtype(config: PretrainedConfig, dtype: torch.dtype) -> PretrainedConfig:
    """A copy of ``config`` whose skeleton is made in ``dtype``, whatever the weights are stored in: constants of the library are rounded to that."""
    found = copy.deepcopy(config)
    found.dtype = dtype
    return found


def build_skeleton(config: PretrainedConfig, head: Head = "causal_lm") -> PreTrainedModel:
    """The whole model with its head on the meta device: structure and names, no memory.

    Raises:
        ModelUnsupported: the library has no model with this head for this configuration.
    """
    what, auto = HEADS[head]
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(copy.deepcopy(config), trust_remote_code=False)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, RuntimeError, ImportError) as error:
        detail = " ".join(str(error).split())[:300]
        raise ModelUnsupported(f"no {what} can be built from a {config.model_type!r} configuration: {detail}") from error
    return model.eval().requires_grad_(False)


def find_layers(model: PreTrainedModel) -> LayerSite:
    """The only list of decoder layers in ``model``.

    Raises:
        ModelUnsupported: there is none, or there are several.
    """
    sites = [
        LayerSite(name.rpartition(".")[0], name.rpartition(".")[2], len(module), tuple(_marks(layer) for layer in module))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    if len(sites) != 1 or not sites[0].parent_name:
        found = ", ".join(site.prefix for site in sites) or "none"
        raise ModelUnsupported(f"expected one list of decoder layers in {type(model).__name__}, found {found}")
    return sites[0]


def _marks(layer: nn.Module) -> dict[str, str]:
    return {name: value for name, value in vars(layer).items() if isinstance(value, str)}


def truncate(model: PreTrainedModel, site: LayerSite, start: int, stop: int) -> nn.Module:
    """Cut ``model`` (consumed) down to the module that loops over its layers, with layers ``start:stop`` and neutral ends.

    The result maps ``inputs_embeds`` to the output of the last layer kept. ``start == stop`` keeps no layer. The layers themselves stay as the
    library built them for the whole model, their numbers and configuration included.
    """
    parent = model.get_submodule(site.parent_name)
    config: Any = parent.config
    neutralise(parent, site.attribute, hidden_size(config))
    layers = getattr(parent, site.attribute)
    _hold(parent, site, list(layers[start:stop]), _slice_config(config, start, max(stop, start + 1), site.num_blocks))
    return parent.eval().requires_grad_(False)


def _hold(parent: nn.Module, site: LayerSite, layers: Sequence[nn.Module], config: PretrainedConfig) -> None:
    """Make ``parent`` loop over ``layers`` as ``config`` says; all other modules keep the configuration of the whole model."""
    setattr(parent, site.attribute, nn.ModuleList(layers))
    parent.config = config  # type: ignore[assignment]


def _slice_config(config: PretrainedConfig, start: int, stop: int, num_blocks: int) -> PretrainedConfig:
    """A copy for ``stop - start`` layers: the count, and every list with one entry per layer, stored or computed."""

    def per_layer(value: object) -> bool:
        return isinstance(value, list | tuple) and len(value) == num_blocks

    kind = type(config)
    computed = {name: getattr(config, name, None) for name in dir(kind) if isinstance(inspect.getattr_static(kind, name), property)}
    cut: dict[str, Any] = {name: value[start:stop] for name, value in computed.items() if value is not None and per_layer(value)}
    sliced = copy.deepcopy(config)
    for name, value in vars(config).items():
        if per_layer(value) and name != "architectures":
            setattr(sliced, name, value[start:stop])
    per_block = max(1, getattr(config, "num_hidden_layers", num_blocks) // num_blocks)  # LongCat counts two for each of its layers
    sliced.num_hidden_layers = per_block * (stop - start)
    sliced.use_cache = False
    if cut:  # what is computed from layer numbers, such as Jamba's period of attention layers, would be computed for the wrong ones
        sliced.__class__ = type(kind.__name__, (kind,), cut)
    return sliced


def init_buffers(model: nn.Module, owner: PreTrainedModel, device: torch.device | str = "cpu", skip: Container[int] = ()) -> None:
    """Give the buffers that were built on the meta device (rotary tables) their values, by the library's own initialisation.

    Args:
        model: changed in place; its parameters keep their values.
        owner: the model of the library that ``model`` is a part of, or is.
        device: of the buffers.
        skip: ids of buffers that get their values elsewhere.

    Raises:
        ModelUnsupported: a buffer stays without a value.
    """
    pending = {
        f"{place}.{name}": (module, name)
        for place, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if _is_meta(buffer) and id(buffer) not in skip
    }
    if not pending:
        return
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)] or [owner]
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # loaded values stay: the library skips what it believes done
    found: list[dict[str, Tensor]] = []
    for blank in (0, 1):  # what the library does not set differs between the two
        for module, name in pending.values():
            empty = torch.empty_like(module.get_buffer(name), device=device)
            module._buffers[name] = empty.fill_(float("nan")) if empty.is_floating_point() else empty.fill_(blank)
        _init_modules([module for module, _ in pending.values()], models)
        if any(_is_unset(module.get_buffer(name)) for module, name in pending.values()):
            _init_modules(models, models)  # a model may set the buffers of its layers
        found.append({name: module.get_buffer(leaf) for name, (module, leaf) in pending.items()})
    for name, (module, leaf) in pending.items():
        one, other = found[0][name], found[1][name]
        if _is_unset(other) or not torch.equal(one, other):
            raise ModelUnsupported(f"the library gives no value to {type(module).__name__}.{leaf}")


def _is_meta(buffer: Tensor | None) -> bool:
    return buffer is not None and buffer.is_meta


def _is_unset(buffer: Tensor) -> bool:
    return buffer.is_floating_point() and not bool(torch.isfinite(buffer).all())


def _init_modules(modules: Sequence[nn.Module], models: Sequence[PreTrainedModel]) -> None:
    """Run the library's initialisation for each module: that of the innermost model that holds it, as the library does."""
    owners = {id(module): model for model in models for module in model.modules()}
    for module in modules:
        owner = owners.get(id(module), models[0])
        try:
            owner._init_weights(module)
        except (AttributeError, TypeError, ValueError, RuntimeError, LookupError, ArithmeticError) as error:
            raise ModelUnsupported(
                f"the library cannot initialise {type(module).__name__} of {type(owner).__name__} in a span: {_line(error)}"
            ) from error


def call_span(parent: nn.Module, hidden_BTH: Tensor, **arguments: Any) -> Tensor:
    """Run a truncated parent on hidden states."""
    output: Tensor = parent(inputs_embeds=hidden_BTH, use_cache=False, return_dict=True, **arguments).last_hidden_state
    return output


def check_identity(config: PretrainedConfig) -> LayerSite:
    """Make sure that spans of this model add up to the model.

    A span of no layers must return its input to the bit, and stand-in layers in spans must be given, to the bit, what they are given in the whole.
    Also finds out in which form the module that loops over the layers expects a layer's output.

    Raises:
        ModelUnsupported: something outside the layers would run once per span, or layers depend on more than their input.
    """
    model = build_skeleton(config)
    site, name = find_layers(model), type(model).__name__
    if getattr(config, "quantization_config", None) is not None:
        raise ModelUnsupported(f"the weights of {name} are stored quantised, which spans do not unpack: use a checkpoint in bfloat16 or float32")
    check_apart(model, site)
    full: Any = model.get_submodule(site.parent_name).config
    try:
        parent = truncate(model, site, 0, 0)
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
        raise ModelUnsupported(f"the configuration of {name} cannot be cut to a span of its layers: {_line(error)}") from error
    if any(getattr(module, "rope_type", None) == "dynamic" for module in parent.modules()):
        raise ModelUnsupported(f"{name} uses dynamic rotary scaling, which depends on earlier calls: use another rope_type")
    init_buffers(parent, model)
    if (why := _why_not_identity(parent, hidden_size(full))) is not None:
        raise ModelUnsupported(f"{name} {why} (a span of zero layers is not the identity), so it cannot be cut into spans exactly: use another model")
    forms = []
    for items in (0, 1, 2):
        _hold(parent, site, [StandIn(site.marks[0], items)], full)
        if _why_not_identity(parent, hidden_size(full)) is None:
            forms.append(items)
    if not forms:
        raise ModelUnsupported(f"{name} does not take the output of a stand-in layer: use another model")
    _check_cuts(parent, replace(site, output_items=forms[-1]), full, name)  # the longest form, because what follows hidden states might be handed on
    return replace(site, output_items=forms[0])


def check_apart(model: PreTrainedModel, site: LayerSite) -> None:
    """Make sure that layers share no parameter with each other or with the rest.

    Raises:
        ModelUnsupported: they do.
    """
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        place = site.split(name)
        owner = "stem or head" if place is None else f"layer {place[0]}"
        if owners.setdefault(id(parameter), owner) != owner:
            raise ModelUnsupported(f"{type(model).__name__} shares {name} between {owners[id(parameter)]} and {owner}, so its layers cannot be split")


def _check_cuts(parent: nn.Module, site: LayerSite, full: PretrainedConfig, name: str) -> None:
    """Compare what stand-in layers are given in the whole with what they are given in spans: of each layer alone, and of the rest after some."""
    generator, full = torch.Generator().manual_seed(1), _with_narrow_windows(full)
    start_BTH, count = _sample(hidden_size(full)), site.num_blocks
    added = [torch.randn(start_BTH.shape, generator=generator) for _ in range(count)]

    def run(start: int, stop: int, hidden_BTH: Tensor) -> list[StandIn]:
        layers = [StandIn(site.marks[block], site.output_items, added[block]) for block in range(start, stop)]
        _hold(parent, site, layers, _slice_config(full, start, stop, count))
        try:
            with torch.no_grad():
                for mask_BT in _MASKS:
                    call_span(parent, hidden_BTH.clone(), attention_mask=mask_BT)
        except _FAILURES as error:
            raise ModelUnsupported(f"{name} cannot run its layers {start}:{stop} alone: {_line(error)}") from error
        return layers

    whole = run(0, count, start_BTH)
    if skipped := [block for block, layer in enumerate(whole) if not layer.given]:
        raise ModelUnsupported(f"{name} does not run its layer {skipped[0]} on text alone, so it cannot be cut into spans")
    if (shared := carrier([given for layer in whole for given in layer.given])) is not None:
        raise ModelUnsupported(f"{name} lets its layers hand things to each other through their argument {shared}, so they cannot be split")
    alone = ((block, block + 1) for block in range(count))
    for start, stop in dict.fromkeys([*alone, *((start, count) for start in (1, count // 2) if 0 < start < count)]):
        cut = run(start, stop, whole[start].given[0].hidden_BTH)
        for block, layer in enumerate(cut, start):
            if (what := first_difference(whole[block].given, layer.given)) is not None:
                raise ModelUnsupported(f"{name} gives its layer {block} other {what} in a span than in the whole model, so it cannot be split")


def _with_narrow_windows(config: PretrainedConfig) -> PretrainedConfig:
    """A copy whose attention windows are narrower than the samples, so that layers of one kind are given other masks than layers of another."""
    found = copy.deepcopy(config)
    for name, value in vars(config).items():
        if type(value) is int and value > 2 and re.search(r"window(?!_layers)|attention_chunk", name):
            setattr(found, name, 2)
    return found


_FAILURES = (TypeError, RuntimeError, AttributeError, IndexError, ValueError, KeyError, NotImplementedError, ModelUnsupported, StopIteration)
"""What a forward that was not made for being cut may raise."""
_MASKS = (None, torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))


def _sample(width: int) -> Tensor:
    return torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0))


def _why_not_identity(parent: nn.Module, width: int) -> str | None:
    """What keeps ``parent`` from returning its input to the bit, with and without masks; ``None`` where it does."""
    hidden_BTH = _sample(width)
    try:
        with torch.no_grad():
            outputs = [call_span(parent, hidden_BTH.clone(), attention_mask=mask_BT) for mask_BT in _MASKS]
    except _FAILURES as error:
        return f"does not run on hidden states alone: {_line(error)}"
    same = all(isinstance(output, Tensor) and torch.equal(output, hidden_BTH) for output in outputs)
    return None if same else "changes hidden states outside its layers"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


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
