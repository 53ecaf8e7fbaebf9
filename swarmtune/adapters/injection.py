"""PEFT's layers in a model or its skeleton, and a list of all tensors that they bring, with the blocks and names under which these travel.

Both halves inject the same plain configuration into the same skeleton, so names agree by construction. Every tensor of a tuner lives with the client,
the frozen ones (projections, norms) too; a server gets them with each call. What a tuner keeps beside its tensors follows from the configuration.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.adaption_prompt.layer import AdaptedAttention, AdaptedAttentionGPT
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from swarmtune.adapters.tuners import MAX_COUNT, TUNERS, kind_of, rebuild, resolve
from swarmtune.errors import AdapterUnsupported, WireError
from swarmtune.skeleton import Head, LayerSite, build_skeleton, find_layers, in_dtype
from swarmtune.wire.messages import AdapterSpec

ADAPTER_NAME = "default"
PEFT_PREFIX = "base_model.model."
HEAD_OF_TASK: Mapping[str, Head] = {"CAUSAL_LM": "causal_lm", "SEQ_CLS": "sequence_classification", "TOKEN_CLS": "token_classification"}
"""PEFT's names of tasks, and our names of heads."""
_WRAPPED = re.compile(r"\.(?:base_layer|original_module)(?=\.|$)|(?<=attn)\.model(?=\.)")
"""What PEFT puts into the names of the modules that it wraps; the last is that of attention under adaption prompts."""


def plain_name(name: str) -> str:
    """The name of a model's own tensor as it is without PEFT."""
    return _WRAPPED.sub("", name)


def wire_name(name: str) -> str:
    """The name within the block as it travels: PEFT's, without the local adapter name."""
    return ".".join(segment for segment in name.split(".") if segment != ADAPTER_NAME)


@dataclass(frozen=True, slots=True, eq=False)
class TunerTensor:
    """A tensor that a tuner brought into the blocks.

    Attributes:
        name: as it travels; within the block, or with the block of its first place where several blocks share it.
        start: first block that uses it.
        stop: one after the last.
        places: block number to its names within that block, where it stands.
        tensor: itself.
    """

    name: str
    start: int
    stop: int
    places: Mapping[int, tuple[str, ...]]
    tensor: Tensor


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers under all of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def tuner_tensors(model: PreTrainedModel, site: LayerSite, plain: frozenset[str]) -> list[TunerTensor]:
    """The tensors that are in the blocks of ``model`` and not in ``plain``, the names that it had before PEFT came, in PEFT's order."""
    found: dict[int, tuple[Tensor, dict[int, list[str]]]] = {}
    for name, tensor in named_tensors(model):
        place = site.split(name)
        if place is not None and plain_name(name) not in plain:
            found.setdefault(id(tensor), (tensor, {}))[1].setdefault(place[0], []).append(place[1])
    tensors = []
    for tensor, places in found.values():
        first = min(places)
        name = wire_name(places[first][0])
        shared = len(places) > 1
        tensors.append(
            TunerTensor(
                f"shared.{first}.{name}" if shared else name, first, max(places) + 1, {block: tuple(names) for block, names in places.items()}, tensor
            )
        )
    return tensors


def travels(spec: AdapterSpec, item: TunerTensor) -> bool:
    """Whether a tuner's tensor comes with each call; some, and most integer ones, follow from the configuration."""
    tuner = TUNERS[str(spec.config["peft_type"])]
    if not item.tensor.is_floating_point():
        return tuner.integers
    return not any(part in item.name.split(".") for part in tuner.computed)


def derived(config: PeftConfig, name: str) -> bool:
    """Whether PEFT computes the first value of a tensor from body weights; ``name`` within the block."""
    parts = ("modules_to_save", *TUNERS[kind_of(config)].derived)
    return any(part in name.split(".") or name.endswith(part) for part in parts)


def plain_names(model: nn.Module) -> frozenset[str]:
    """The names of all tensors of a model without PEFT."""
    return frozenset(name for name, _ in named_tensors(model))


def inject(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Put the tuner's layers into ``model`` by PEFT itself.

    Raises:
        AdapterUnsupported: PEFT refuses, or no module matches.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            injected: PeftModel = get_peft_model(model, copy.deepcopy(config), adapter_name=ADAPTER_NAME)  # type: ignore[assignment]
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, AssertionError, ImportError, ArithmeticError, re.error) as error:
        raise AdapterUnsupported(_why_not(model, config, error)) from error
    return injected


def _why_not(model: PreTrainedModel, config: PeftConfig, error: Exception) -> str:
    site = find_layers(model)
    leaves = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if site.split(name) and isinstance(module, torch.nn.Linear)})
    targets = getattr(config, "target_modules", None)
    if "not found" in str(error) or "No modules" in str(error) or "No layers" in str(error):
        shown = sorted(targets) if isinstance(targets, set) else targets
        return f"target_modules={shown} match nothing in {type(model).__name__}: name some of its linear modules: {', '.join(leaves)}"
    return f"PEFT cannot put this adapter into {type(model).__name__}: {(str(error) or type(error).__name__).splitlines()[0][:300]}"


def spec_of(injected: PeftModel, config: PeftConfig, site: LayerSite) -> AdapterSpec | None:
    """What travels of a configuration; ``None`` where nothing of it is inside the blocks.

    Raises:
        AdapterUnsupported: modules inside and outside of the blocks share what cannot be shared over a network.
    """
    base = cast(PreTrainedModel, injected.get_base_model())
    fused = next((name for name, module in base.named_modules() if isinstance(module, ParamWrapper)), None)
    if fused is not None:
        raise AdapterUnsupported(
            f"PEFT puts this adapter on the fused experts in {fused.removesuffix('.base_layer')}, which is not supported: leave expert layers "
            "(such as gate_proj, up_proj, down_proj) out of target_modules"
        )
    inside: dict[str, Any] = {}
    copied, outside = [], []
    for name, module in base.named_modules():
        place = site.split(name)
        if isinstance(module, BaseTunerLayer | AdaptedAttention | AdaptedAttentionGPT) and not isinstance(module, AuxiliaryTrainingWrapper):
            if place is None:
                outside.append(name)
            else:
                inside[f"{place[0]}.{place[1]}"] = module
        elif isinstance(module, ModulesToSaveWrapper) and place is not None:
            copied.append(f"{place[0]}.{place[1]}")
        elif isinstance(module, AuxiliaryTrainingWrapper) and place is not None:
            raise AdapterUnsupported(f"{type(module).__name__} on {name} inside the blocks is not supported: leave it out")
    if not inside and not copied:
        return None
    kind = kind_of(config)
    if outside and TUNERS[kind].joint:
        raise AdapterUnsupported(
            f"target module {outside[0]} lies outside the blocks, and {type(config).__name__} shares tensors between all of its modules: "
            "leave it out of target_modules"
        )
    extra: dict[str, Any] = {"copied": sorted(copied)} if copied else {}
    if kind == "IA3":
        extra["feedforward"] = sorted(name for name, module in inside.items() if bool(getattr(module, "is_feedforward", False)))
    if kind == "LILY":
        extra["suffixes"] = _suffixes(injected.peft_config[ADAPTER_NAME])
    if kind == "ADALORA":
        extra["ranks"] = {name: int(cast(Any, module).lora_A[ADAPTER_NAME].shape[0]) for name, module in inside.items()}
    return resolve(config, list(inside), site.prefix, extra)


def _suffixes(config: PeftConfig) -> list[str]:
    """The ends of module names by which LILY groups the modules that share tensors.

    Raises:
        AdapterUnsupported: a pattern instead.
    """
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str):
        raise AdapterUnsupported(f"target_modules={targets!r} of LilyConfig is not supported, because a pattern would not travel: list names")
    return sorted(targets or ())


def weightless(model: PreTrainedModel, dtype: torch.dtype | None = None, plain: frozenset[str] | None = None) -> PreTrainedModel:
    """Replace meta parameters by CPU tensors of the right shape over a single stored zero.

    PEFT initialises its layers on the device and in the type of their base layer; on the meta device the values would be lost.

    Args:
        model: to change.
        dtype: of the new tensors; the old ones' where not given.
        plain: only parameters whose names without PEFT are these.
    """
    for owner, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta and (plain is None or plain_name(f"{owner}.{name}" if owner else name) in plain):
                zero = torch.zeros((), dtype=dtype or parameter.dtype).expand(parameter.shape)
                module.register_parameter(name, nn.Parameter(zero, requires_grad=False))
    return model


@dataclass(frozen=True, slots=True, eq=False)
class Injected:
    """A skeleton with a tuner's layers in it.

    Attributes:
        model: the base model; its own weights are on the meta device or weightless.
        tensors: what the tuner brought into the blocks.
    """

    model: PreTrainedModel
    tensors: list[TunerTensor]


def inject_plain(model: PreTrainedModel, spec: AdapterSpec, site: LayerSite, blocks: range | None, *, meta: bool) -> Injected:
    """Inject a peer's configuration into ``model``.

    Args:
        model: a skeleton of the whole model.
        spec: what came.
        site: where the model keeps its layers.
        blocks: only targets in these, where the tuner allows that.
        meta: make the tuner's tensors on the meta device.

    Raises:
        WireError: the configuration does not fit the model.
    """
    plain = plain_names(model)
    tuner = TUNERS.get(str(spec.config.get("peft_type")))
    targets = spec.config.get("modules")
    near = isinstance(targets, list) and blocks is not None and any(str(name).partition(".")[0] in map(str, blocks) for name in targets)
    config = rebuild(spec, site.prefix, blocks if near and tuner is not None and not tuner.joint else None)
    modules = dict(model.named_modules())
    for name in [*spec.config["modules"], *spec.config.get("copied", [])]:
        if site.prefix + name not in modules:
            raise WireError(f"the model has no module {site.prefix + name!r}")
    try:
        if meta:
            with torch.device("meta"):
                injected = inject(model, config)
        else:
            injected = inject(model, config)
    except AdapterUnsupported as error:
        raise WireError(str(error)) from error
    base = cast(PreTrainedModel, injected.get_base_model())
    if "suffixes" in spec.config or spec.config["peft_type"] == "ADAPTION_PROMPT":
        _check_targets(base, site, spec)
    if "ranks" in spec.config:
        _resize(base, site, spec, blocks)
    return Injected(base.eval().requires_grad_(False), tuner_tensors(base, site, plain))


def _check_targets(model: PreTrainedModel, site: LayerSite, spec: AdapterSpec) -> None:
    """Ends of names must lead to exactly the modules that were listed."""
    kinds = BaseTunerLayer | AdaptedAttention | AdaptedAttentionGPT
    places = [site.split(name) for name, module in model.named_modules() if isinstance(module, kinds)]
    found = sorted(f"{place[0]}.{place[1]}" for place in places if place is not None)
    if found != spec.config["modules"]:
        raise WireError("the ends of an adapter's module names lead to other modules than it lists")


def _resize(model: PreTrainedModel, site: LayerSite, spec: AdapterSpec, blocks: range | None) -> None:
    """Give AdaLoRA's modules the ranks that training has left them."""
    ranks = spec.config["ranks"]
    if (
        not isinstance(ranks, dict)
        or not set(ranks) <= set(spec.config["modules"])
        or not all(type(rank) is int and 0 <= rank <= MAX_COUNT for rank in ranks.values())
    ):
        raise WireError(f"ranks of an adapter configuration must be integers from 0 to {MAX_COUNT} by module")
    for name, rank in ranks.items():
        if blocks is not None and int(name.partition(".")[0]) not in blocks:
            continue
        module: Any = model.get_submodule(site.prefix + name)
        rows, columns = module.lora_A[ADAPTER_NAME].shape[1], module.lora_B[ADAPTER_NAME].shape[0]
        for holder, shape in ((module.lora_A, (rank, rows)), (module.lora_E, (rank, 1)), (module.lora_B, (columns, rank))):
            holder[ADAPTER_NAME] = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


def fresh(model_config: PretrainedConfig, config: PeftConfig) -> PeftModel:
    """PEFT's layers in a skeleton without weights, for values to be put into; as little as possible is initialised, for that may take long."""
    # Copies of norms and biases must not be rounded to the type of the model.
    skeleton = build_skeleton(
        in_dtype(model_config, torch.float32), HEAD_OF_TASK.get(str(getattr(config.task_type, "value", config.task_type)), "causal_lm")
    )
    tuner = TUNERS.get(kind_of(config))
    if tuner is None or tuner.materialised or getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None):
        return inject(weightless(skeleton), config)
    plain = plain_names(skeleton)
    with torch.device("meta"):
        injected = inject(skeleton, config)
    weightless(cast(PreTrainedModel, injected.get_base_model()), plain=plain)
    put(injected, {name: torch.zeros_like(tensor, device="cpu") for name, tensor in named_tensors(injected) if tensor.is_meta})
    return injected


def put(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Replace tensors of ``model`` by name, wherever they stand, whatever their shape."""
    places: dict[int, list[str]] = {}
    for name, tensor in named_tensors(model):
        places.setdefault(id(tensor), []).append(name)
    ids = {name: id(tensor) for name, tensor in named_tensors(model)}
    for name, value in values.items():
        for alias in places[ids[name]]:
            owner_name, _, leaf = alias.rpartition(".")
            owner = model.get_submodule(owner_name)
            if leaf in owner._parameters:
                owner._parameters[leaf] = nn.Parameter(value.detach(), requires_grad=False) if value.is_floating_point() else value  # type: ignore[assignment]
            else:
                owner._buffers[leaf] = value.detach()


def unshare(layers: nn.ModuleList) -> None:
    """Give every layer module objects of its own: what several layers share is copied without its tensors.

    ``functional_call`` puts tensors into modules, so a module in two layers would have the second one's in both.
    """
    seen: set[int] = set()
    for layer in layers:
        own: dict[int, nn.Module] = {}
        for name, module in list(layer.named_modules(remove_duplicate=False)):
            if not name or id(module) in own or id(module) not in seen:
                own.setdefault(id(module), module)
                continue
            twin = copy.copy(module)
            twin._parameters, twin._buffers, twin._modules = dict(module._parameters), dict(module._buffers), dict(module._modules)
            own[id(module)] = twin
        for module in list(own.values()):
            for name, child in module._modules.items():
                if child is not None and own.get(id(child), child) is not child:
                    module._modules[name] = own[id(child)]
        seen |= own.keys()
