"""PEFT tuners over a skeleton: which are supported, how a configuration travels, where its tensors lie.

Both halves inject the same plain configuration into the same skeleton, so names and shapes agree by construction. What travels is resolved:
full module names instead of patterns, so that no server evaluates a regular expression of a stranger.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PretrainedConfig, PreTrainedModel

from swarmtune.errors import AdapterUnsupported, WireError
from swarmtune.skeleton import build_skeleton, find_layers
from swarmtune.wire.messages import AdapterSpec

ADAPTER_NAME = "default"
PEFT_PREFIX = "base_model.model."
MAX_RANK = 1 << 14
MAX_MODULES = 1 << 14
_MODULE_NAME = re.compile(r"[A-Za-z0-9_.]{1,256}")


def _resolve_lora(config: LoraConfig, layers: Mapping[str, Any]) -> dict[str, Any]:
    """Ranks and scalings as PEFT resolved them, per module; ``lora_alpha`` follows from the scaling."""
    ranks = {name: int(layer.r[ADAPTER_NAME]) for name, layer in layers.items()}
    alphas = {name: float(layer.lora_alpha[ADAPTER_NAME]) for name, layer in layers.items()}
    return {
        "ranks": [ranks[name] for name in sorted(layers)],
        "alphas": [alphas[name] for name in sorted(layers)],
        "rslora": bool(config.use_rslora),
        "fan_in_fan_out": bool(config.fan_in_fan_out),
    }


def _build_lora(fields: Mapping[str, Any], modules: list[str]) -> PeftConfig:
    ranks, alphas = fields.get("ranks"), fields.get("alphas")
    if not isinstance(ranks, list) or not isinstance(alphas, list) or not len(ranks) == len(alphas) == len(modules):
        raise WireError("a LoRA configuration needs one rank and one alpha per module")
    if any(type(rank) is not int or not 0 < rank <= MAX_RANK for rank in ranks):
        raise WireError(f"a LoRA rank must be an integer from 1 to {MAX_RANK}")
    if any(type(alpha) not in (int, float) or not abs(alpha) <= 1e6 for alpha in alphas):
        raise WireError("a LoRA alpha must be a number of at most 1e6")
    if not isinstance(fields.get("rslora"), bool) or not isinstance(fields.get("fan_in_fan_out"), bool):
        raise WireError("rslora and fan_in_fan_out must be true or false")
    patterns = [re.escape(module) for module in modules]
    return LoraConfig(
        r=ranks[0],
        lora_alpha=alphas[0],
        # PEFT tries every pattern on every module: only the modules that differ get one.
        rank_pattern={pattern: rank for pattern, rank in zip(patterns, ranks, strict=True) if rank != ranks[0]},
        alpha_pattern={pattern: alpha for pattern, alpha in zip(patterns, alphas, strict=True) if alpha != alphas[0]},
        use_rslora=fields["rslora"],
        fan_in_fan_out=fields["fan_in_fan_out"],
        target_modules=list(modules),
        lora_dropout=0.0,
    )


def _resolve_ia3(config: IA3Config, layers: Mapping[str, Any]) -> dict[str, Any]:
    return {"feedforward": [bool(layers[name].is_feedforward) for name in sorted(layers)], "fan_in_fan_out": bool(config.fan_in_fan_out)}


def _build_ia3(fields: Mapping[str, Any], modules: list[str]) -> PeftConfig:
    feedforward = fields.get("feedforward")
    if not isinstance(feedforward, list) or len(feedforward) != len(modules) or not all(isinstance(flag, bool) for flag in feedforward):
        raise WireError("an IA3 configuration needs one feedforward flag per module")
    if not isinstance(fields.get("fan_in_fan_out"), bool):
        raise WireError("fan_in_fan_out must be true or false")
    return IA3Config(
        target_modules=list(modules),
        feedforward_modules=[name for name, flag in zip(modules, feedforward, strict=True) if flag],
        fan_in_fan_out=fields["fan_in_fan_out"],
    )


_FIELDS = {
    "LORA": frozenset({"peft_type", "modules", "ranks", "alphas", "rslora", "fan_in_fan_out"}),
    "IA3": frozenset({"peft_type", "modules", "feedforward", "fan_in_fan_out"}),
}
_TUNERS: dict[str, tuple[Callable[..., dict[str, Any]], Callable[[Mapping[str, Any], list[str]], PeftConfig]]] = {
    "LORA": (_resolve_lora, _build_lora),
    "IA3": (_resolve_ia3, _build_ia3),
}


OVER_QUANTISED: Mapping[str, Mapping[str, frozenset[str]]] = {
    "LORA": {"int8": frozenset({"float32", "bfloat16", "float16"}), "nf4": frozenset({"float32", "bfloat16", "float16"})},
    "IA3": {"int8": frozenset({"float32"}), "nf4": frozenset({"float32"})},  # PEFT's layers return float32 whatever comes in: bodies in half fail
}
"""PEFT type to quantisation to the served dtypes in which it was seen to equal a local PEFT model over the same quantised layers, gradients included
(tests/corridor/test_quantised.py). What is not listed is refused: some types ignore that their base is quantised, and are silently wrong."""


def check_over_quantised(kind: str, quantisation: str, dtype: str) -> None:
    """Refuse a PEFT type that is not known to be right over bases quantised in this way.

    Args:
        kind: PEFT's name of the type, such as ``LORA``.
        quantisation: ``none``, ``int8``, ``nf4`` or what a newer server may say.
        dtype: in which the servers compute, such as ``float32``.

    Raises:
        AdapterUnsupported: with what is allowed there.
    """
    if quantisation == "none" or dtype in OVER_QUANTISED.get(kind, {}).get(quantisation, ()):
        return
    allowed = sorted(other for other, modes in OVER_QUANTISED.items() if dtype in modes.get(quantisation, ()))
    raise AdapterUnsupported(
        f"adapters of type {kind} are not known to be right over blocks held in {quantisation} and computed in {dtype}: use "
        + (f"{' or '.join(allowed)}, or servers with quantize=none" if allowed else "servers with quantize=none")
    )


def check_type(kind: str) -> None:
    """Refuse a PEFT type that cannot be trained through the swarm.

    Raises:
        AdapterUnsupported: with the types that can.
    """
    if kind not in _TUNERS:
        raise AdapterUnsupported(f"adapters of type {kind} are not supported: use one of {', '.join(sorted(_TUNERS))}")


def check_supported(config: PeftConfig) -> None:
    """Refuse what could not be trained exactly through the swarm.

    Raises:
        AdapterUnsupported: with the reason and what to do.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    check_type(kind)
    if saved := getattr(config, "modules_to_save", None):
        raise AdapterUnsupported(f"modules_to_save={saved} is not supported: train the adapter without it")
    if getattr(config, "target_parameters", None):
        raise AdapterUnsupported("target_parameters is not supported: name modules in target_modules")
    if not isinstance(config, LoraConfig):
        return
    if config.lora_dropout:
        raise AdapterUnsupported(f"lora_dropout={config.lora_dropout} is not supported, because a recomputed mask would differ: set lora_dropout=0")
    if config.use_dora:
        raise AdapterUnsupported("use_dora=True is not supported, because its magnitudes start from body weights: set use_dora=False")
    if config.bias != "none":
        raise AdapterUnsupported(f"bias={config.bias!r} is not supported: set bias='none'")
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise AdapterUnsupported(
            f"init_lora_weights={config.init_lora_weights!r} is not supported, because it needs body weights: use True or 'gaussian'"
        )
    plain = LoraConfig()
    known = {
        "r",
        "lora_alpha",
        "use_rslora",
        "fan_in_fan_out",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
    }
    general = {
        "task_type",
        "peft_type",
        "target_modules",
        "exclude_modules",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "peft_version",
        "runtime_config",
    }
    for name, value in vars(config).items():
        if name not in known | general and not name.startswith("_") and value != getattr(plain, name, None):
            raise AdapterUnsupported(f"{name}={value!r} of LoraConfig is not supported: leave it at its default")


def inject(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Put the tuner's layers into ``model`` by PEFT itself.

    Raises:
        AdapterUnsupported: PEFT refuses, or no module matches.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            injected: PeftModel = get_peft_model(model, copy.deepcopy(config), adapter_name=ADAPTER_NAME)
    except (ValueError, KeyError, TypeError, AttributeError, NotImplementedError, re.error) as error:
        raise AdapterUnsupported(_why_not(model, config, error)) from error
    return injected


def _why_not(model: PreTrainedModel, config: PeftConfig, error: Exception) -> str:
    site = find_layers(model)
    leaves = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if site.split(name) and isinstance(module, torch.nn.Linear)})
    targets = getattr(config, "target_modules", None)
    if "not found" in str(error) or "No modules" in str(error):
        shown = sorted(targets) if isinstance(targets, set) else targets
        return f"target_modules={shown} match nothing in {type(model).__name__}: name some of its linear modules: {', '.join(leaves)}"
    return f"PEFT cannot put this adapter into {type(model).__name__}: {str(error).splitlines()[0][:300]}"


def resolve(injected: PeftModel, config: PeftConfig) -> AdapterSpec:
    """The plain configuration that travels: the tuner's type, the full names of its modules, and what PEFT resolved for each.

    Raises:
        AdapterUnsupported: a target lies outside the blocks.
    """
    base = cast(PreTrainedModel, injected.get_base_model())
    site = find_layers(base)
    layers = {name: module for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)}
    if fused := [name for name, layer in layers.items() if isinstance(layer, ParamWrapper)]:
        raise AdapterUnsupported(
            f"PEFT puts this adapter on the fused experts in {fused[0].removesuffix('.base_layer')}, which is not supported: leave names of expert "
            "layers (such as gate_proj, up_proj, down_proj) out of target_modules"
        )
    outside = [name for name in layers if site.split(name) is None]
    if outside:
        raise AdapterUnsupported(
            f"target module {outside[0]} lies outside the blocks, in the part that stays with you: leave it out of target_modules"
        )
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    return AdapterSpec.of({"peft_type": kind, "modules": sorted(layers), **_TUNERS[kind][0](config, layers)})


def rebuild(spec: AdapterSpec) -> PeftConfig:
    """The PEFT configuration that a peer's plain one stands for, every field checked.

    Raises:
        WireError: an unknown type, or fields that do not fit.
    """
    kind, modules = spec.config.get("peft_type"), spec.config.get("modules")
    if not isinstance(kind, str) or kind not in _TUNERS:
        raise WireError(f"adapters of type {str(kind)[:40]!r} are not supported by this server: it knows {', '.join(sorted(_TUNERS))}")
    if unknown := set(spec.config) - _FIELDS[kind]:
        raise WireError(f"an adapter configuration holds a field that this server does not know: {sorted(unknown)[0]!r:.80}")
    if not isinstance(modules, list) or not 0 < len(modules) <= MAX_MODULES or modules != sorted(set(map(str, modules))):
        raise WireError("an adapter configuration must list its modules, sorted, each once")
    if not all(_MODULE_NAME.fullmatch(module) for module in modules):
        raise WireError("an adapter's module names may hold letters, digits, dots and underscores")
    return _TUNERS[kind][1](spec.config, modules)


def injected_skeleton(model_config: PretrainedConfig, spec: AdapterSpec, prepare: Callable[[PreTrainedModel], None] | None = None) -> PreTrainedModel:
    """A meta skeleton of the whole model with the tuner's layers in it, for a server.

    ``prepare`` is called with the skeleton before: it may put quantised layers into it, for which PEFT has layers of its own.

    Raises:
        WireError: the configuration does not fit the model.
    """
    config = rebuild(spec)
    model = build_skeleton(model_config)
    names = {name for name, _ in model.named_modules()}
    unknown = [module for module in spec.config["modules"] if module not in names]
    if unknown:
        raise WireError(f"the model has no module {unknown[0]!r}")
    if prepare is not None:
        prepare(model)
    try:
        with torch.device("meta"):
            base = cast(PreTrainedModel, inject(model, config).get_base_model())
    except AdapterUnsupported as error:
        raise WireError(str(error)) from error
    return base.eval().requires_grad_(False)


def wire_name(parameter: str) -> str:
    """The name within the block as it travels: PEFT's, without the local adapter name."""
    return ".".join(segment for segment in parameter.split(".") if segment != ADAPTER_NAME)
