"""PEFT's tuner types: which can be right through a swarm, and how their configurations travel.

What travels is resolved: full module names instead of patterns, plain values of known fields. So no server evaluates a regular expression of a
stranger, and the only fields that reach PEFT there are those in ``TUNERS``.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, PeftType
from peft.utils.other import get_pattern_key

from swarmtune.errors import AdapterUnsupported, WireError
from swarmtune.wire.messages import AdapterSpec

MAX_COUNT = 1 << 14
"""Largest rank, block size or other count of a peer's configuration."""
MAX_MODULES = 1 << 14
MAX_PROMPT_TOKENS = 1 << 14
_MODULE_NAME = re.compile(r"\d{1,6}\.[A-Za-z0-9_.]{1,256}")
_SUFFIX = re.compile(r"[A-Za-z0-9_.]{1,128}")
_WORD = re.compile(r"[A-Za-z0-9_]{1,32}")


class _Name(str):
    """A full module name where PEFT takes a pattern. It is found by equality; as a pattern it matches nothing, and so costs nothing.

    PEFT formats each into a regular expression of its own, and hundreds of these, compiled again for each module, take minutes.
    """

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        """As a part of a pattern."""
        return "(?!)"


@dataclass(frozen=True, slots=True)
class Tuner:
    """How one PEFT type travels and trains.

    Attributes:
        fields: fields of its configuration that decide what a block computes; they travel as they are.
        patterns: fields that map patterns of module names to values; they travel with full names.
        local: fields that only matter where the tensors are made or saved, which is here.
        dropout: the field of a dropout whose sites are ``nn.Dropout``, so that a server can seed it.
        unseedable: fields of dropouts that draw from the global generator; they must be 0.
        fixed: fields that must keep the given value, and why.
        derived: parts of the names of tensors that PEFT computes from body weights: their first values come from the servers.
        draws: derived values depend on random numbers too.
        materialised: a server needs more than names and shapes: PEFT computes indices or permutations while it injects.
        computed: parts of the names of tensors that a server computes while it materialises the tuner, so that they need not travel.
        joint: modules share tensors, or what PEFT computes for one depends on the others: a server must know them all.
        integers: integer tensors travel too; others are computed where a tuner is materialised.
        mixes_rows: what it computes for one row of a batch depends on the others, so a batch cannot be cut into micro-batches.
        trains: whether training it through a swarm is what training it locally is; ``why`` says why not.
        bounds: largest values of counts that each cost a pass of a loop or a copy of a matrix; of others it is ``MAX_COUNT``.
    """

    fields: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    local: tuple[str, ...] = ()
    dropout: str | None = None
    unseedable: tuple[str, ...] = ()
    fixed: Mapping[str, tuple[Any, str]] = dataclasses.field(default_factory=dict)
    derived: tuple[str, ...] = ()
    draws: bool = False
    materialised: bool = False
    computed: tuple[str, ...] = ()
    joint: bool = False
    integers: bool = False
    mixes_rows: bool = False
    trains: bool = True
    why: str = ""
    bounds: Mapping[str, int] = dataclasses.field(default_factory=dict)


_FAN = "fan_in_fan_out"
TUNERS: Mapping[str, Tuner] = {
    "LORA": Tuner(
        ("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", _FAN),
        ("rank_pattern", "alpha_pattern"),
        ("init_lora_weights", "trainable_token_indices"),
        "lora_dropout",
        derived=("lora_magnitude_vector",),
    ),
    "ADALORA": Tuner(
        ("init_r", "lora_alpha", _FAN),
        local=("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "rank_pattern", "init_lora_weights", "r"),
        dropout="lora_dropout",
    ),
    "ADAPTION_PROMPT": Tuner(("adapter_len", "adapter_layers"), joint=True),
    "BEFT": Tuner(),
    "BOFT": Tuner(
        ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor", _FAN), unseedable=("boft_dropout",), materialised=True, computed=("boft_P",)
    ),
    "C3A": Tuner(("block_size",), ("block_size_pattern",)),
    "DEFT": Tuner(
        ("r", "decomposition_method", "init_scale", "alpha", "para", "init_weights", _FAN), dropout="deft_dropout", derived=("deft_R",), draws=True
    ),
    "DELORA": Tuner(("r", "delora_lambda"), ("rank_pattern", "lambda_pattern"), dropout="module_dropout", derived=("delora_w_norm",)),
    "FOURIERFT": Tuner(("n_frequency", "scaling", "random_loc_seed", _FAN), ("n_frequency_pattern",), materialised=True),
    "GLORA": Tuner(("r", "config_A_B", "config_C", "config_D_E")),
    "GRALORA": Tuner(("r", "hybrid_r", "alpha", "gralora_k", _FAN), dropout="gralora_dropout", bounds={"gralora_k": 64}),
    "HIRA": Tuner(("r", _FAN), ("rank_pattern",), dropout="hira_dropout"),
    "HRA": Tuner(("r", "apply_GS"), bounds={"r": 256}),
    "IA3": Tuner((_FAN,), local=("init_ia3_weights", "feedforward_modules")),
    "LILY": Tuner(
        ("r", "stride_A", "num_B", "scaling"),
        fixed={
            "layers_to_transform": (None, "which blocks share tensors follows from the names of its targets alone"),
            "exclude_modules": (None, "which modules share tensors follows from the names of its targets alone"),
        },
        mixes_rows=True,
        joint=True,
    ),
    "LN_TUNING": Tuner(derived=("ln_tuning_layers",)),
    "LOHA": Tuner(("r", "alpha", "use_effective_conv2d"), ("rank_pattern", "alpha_pattern"), unseedable=("rank_dropout", "module_dropout")),
    "LOKR": Tuner(
        ("r", "alpha", "use_effective_conv2d", "decompose_both", "decompose_factor"),
        ("rank_pattern", "alpha_pattern"),
        unseedable=("rank_dropout", "module_dropout"),
    ),
    "MISS": Tuner(("r", "mini_r", "init_weights"), dropout="miss_dropout"),
    "OFT": Tuner(
        ("r", "oft_block_size", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms", "eps", _FAN),
        unseedable=("module_dropout",),
        fixed={"coft": (False, "its layers change their own parameters in the forward pass, which no server may do")},
        materialised=True,
        bounds={"num_cayley_neumann_terms": 64},
    ),
    "PEANUT": Tuner(("r", "depth", "act_fn", "scaling"), bounds={"depth": 64}),
    "PSOFT": Tuner(
        (
            *("r", "psoft_alpha", "ab_svd_init", "psoft_svd", "psoft_svd_lowrank_niter", "random_seed", "psoft_orth", "psoft_mag_b", "psoft_mag_a"),
            *("use_cayley_neumann", "num_cayley_neumann_terms", "cayley_neumann_eps", _FAN),
        ),
        dropout="psoft_dropout",
        derived=("_psoft_A_cache", "_psoft_B_cache"),
        integers=True,
        bounds={"num_cayley_neumann_terms": 64, "psoft_svd_lowrank_niter": 64},
    ),
    "PVERA": Tuner(
        ("r", _FAN),
        local=("projection_prng_key", "save_projection", "d_initial", "generator_seed"),
        dropout="pvera_dropout",
        fixed={"sample_at_inference": (False, "a recomputed sample would differ")},
        trains=False,
        why="it samples its activations while it trains, and a recomputed sample would differ",
        joint=True,
    ),
    "RANDLORA": Tuner(
        ("r", "randlora_alpha", _FAN),
        local=("projection_prng_key", "save_projection", "sparse", "very_sparse"),
        dropout="randlora_dropout",
        joint=True,
    ),
    "ROAD": Tuner(("variant", "group_size")),
    "SHIRA": Tuner(
        ("r", "random_seed", _FAN),
        fixed={"mask_type": ("random", "a server runs no mask function of yours")},
        materialised=True,
    ),
    "SUPERTUNING": Tuner(
        ("sparsity", "select_top", "r", "lora_alpha"),
        local=("save_precomputed_indices",),
        dropout="lora_dropout",
        derived=("supertuning_indices",),
        integers=True,
    ),
    "TINYLORA": Tuner(
        ("r", "u", "weight_tying", "projection_seed", _FAN),
        local=("save_projection", "init_v_bound"),
        dropout="tinylora_dropout",
        derived=("tinylora_A", "tinylora_B"),
        joint=True,
    ),
    "TRAINABLE_TOKENS": Tuner(local=("token_indices",)),
    "UNILORA": Tuner(
        ("r", "proj_seed", "theta_d_length", _FAN),
        local=("init_theta_d_bound", "save_indices"),
        dropout="unilora_dropout",
        materialised=True,
        computed=("unilora_scales_A", "unilora_scales_B"),
        joint=True,
    ),
    "VBLORA": Tuner(
        ("r", "num_vectors", "vector_length", "topk", _FAN),
        local=("init_vector_bank_bound", "init_logits_std"),
        dropout="vblora_dropout",
        fixed={"save_only_topk_weights": (False, "what it saves cannot be trained on")},
        joint=True,
    ),
    "VERA": Tuner(("r", _FAN), local=("projection_prng_key", "save_projection", "d_initial"), dropout="vera_dropout", joint=True),
    "WAVEFT": Tuner(
        ("n_frequency", "scaling", "wavelet_family", "use_idwt", "random_loc_seed", _FAN),
        ("n_frequency_pattern",),
        fixed={"proportional_parameters": (False, "what it gives one module depends on all others")},
        materialised=True,
    ),
}
"""PEFT types whose tensors lie in modules, with what a server must know of them; tests/corridor/test_adapters.py holds each against PEFT."""

SPEC_FIELDS = ("peft_type", "modules", "fields", "patterns", "copied")
"""What the configuration of every type may hold."""
_EXTRA: Mapping[str, tuple[str, ...]] = {"ADALORA": ("ranks",), "IA3": ("feedforward",), "LILY": ("suffixes",)}

PROMPT_LEARNING: Mapping[str, str] = {
    "PROMPT_TUNING": "virtual tokens before the text",
    "P_TUNING": "virtual tokens made by an encoder",
    "MULTITASK_PROMPT_TUNING": "virtual tokens for each task",
    "CPT": "virtual tokens with a loss of their own",
    "PREFIX_TUNING": "keys and values before those of each block",
    "CARTRIDGE": "keys and values before those of each block",
}
"""PEFT types that train virtual tokens, by PEFT's own code here; keys and values of the last two travel (``prefix.key``, ``prefix.value``)."""
CACHE_PREFIX = ("PREFIX_TUNING", "CARTRIDGE")

REFUSED: Mapping[str, str] = {
    "ADAMSS": "it clusters a decomposition of the body's weights with scikit-learn, and what it trains follows from that",
    "FROD": "it decomposes the weights of all blocks jointly, and no server holds them all",
    "OSF": "it takes the body's weights apart and trains parts of them under a projection of its gradients",
    "POLY": "its layers mix adapters by task ids, which do not reach them",
    "SHADOW": "it runs a network of its own beside the layers, from one to the next",
    "XLORA": "it runs the body twice and mixes adapters by its hidden states",
}
"""PEFT types that cannot be right, with the reason."""

GENERAL = frozenset(
    (
        *("task_type", "peft_type", "auto_mapping", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
        *("base_model_name_or_path", "revision", "inference_mode", "peft_version", "init_weights", "bias", "ensure_weight_tying"),
    )
)
"""Fields that many types have, and that mean the same in all: they decide which modules, or only matter here."""

OVER_QUANTISED: Mapping[str, Mapping[str, frozenset[str]]] = {
    "LORA": {"int8": frozenset({"float32", "bfloat16", "float16"}), "nf4": frozenset({"float32", "bfloat16", "float16"})},
    "IA3": {"int8": frozenset({"float32"}), "nf4": frozenset({"float32"})},  # PEFT's layers return float32 whatever comes in: bodies in half fail
}
"""PEFT type to quantisation to the served dtypes in which it was seen to equal a local PEFT model over the same quantised layers, gradients included
(tests/corridor/test_quantised.py). What is not listed is refused: some types ignore that their base is quantised, and are silently wrong."""


def kind_of(config: PeftConfig) -> str:
    """PEFT's name of the type, such as ``LORA``."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def kind_over_base(spec: AdapterSpec) -> str:
    """The type as ``check_over_quantised`` takes it: DoRA counts as one of its own."""
    fields = spec.config.get("fields")
    return "DoRA" if isinstance(fields, dict) and fields.get("use_dora") else str(spec.config.get("peft_type"))


def check_over_quantised(kind: str, quantisation: str, dtype: str) -> None:
    """Refuse a PEFT type that is not known to be right over bases quantised in this way.

    Args:
        kind: PEFT's name of the type, such as ``LORA``; see ``kind_over_base``.
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
    """Refuse a PEFT type that cannot be right through the swarm.

    Raises:
        AdapterUnsupported: with the reason, and the types that can.
    """
    if kind in TUNERS or kind in PROMPT_LEARNING:
        return
    why = REFUSED.get(kind, "it is newer than this version of swarmtune, and nobody has seen yet that it is right")
    raise AdapterUnsupported(f"adapters of type {kind} are not supported, because {why}: use one of {', '.join(sorted({*TUNERS, *PROMPT_LEARNING}))}")


def check_supported(config: PeftConfig) -> None:
    """Refuse what could not be trained exactly through the swarm.

    Raises:
        AdapterUnsupported: with the reason and what to do.
    """
    kind = kind_of(config)
    check_type(kind)
    if kind in PROMPT_LEARNING:
        _check_prompt_learning(config)
        return
    tuner, name = TUNERS[kind], type(config).__name__
    for field in tuner.unseedable:
        if getattr(config, field, 0):
            raise AdapterUnsupported(
                f"{field}={getattr(config, field)} of {name} is not supported, because its mask comes from global random numbers and a recomputed "
                f"one would differ: set {field}=0"
            )
    for field, (wanted, why) in tuner.fixed.items():
        if getattr(config, field) != wanted:
            raise AdapterUnsupported(f"{field}={getattr(config, field)!r} of {name} is not supported, because {why}: set {field}={wanted!r}")
    if isinstance(config, LoraConfig):
        _check_lora(config)
    plain = _plain(type(config))
    known = {*GENERAL, *tuner.fields, *tuner.patterns, *tuner.local, *tuner.fixed, *tuner.unseedable, tuner.dropout}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.name not in known and value not in (plain.get(item.name), None) and not (value in ({}, [], ()) and plain.get(item.name) is None):
            raise AdapterUnsupported(f"{item.name}={value!r:.100} of {name} is not supported: leave it at its default")


def _plain(schema: type[PeftConfig]) -> dict[str, Any]:
    """Defaults of a configuration's fields."""
    found = {}
    for field in dataclasses.fields(schema):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def _check_lora(config: LoraConfig) -> None:
    start = config.init_lora_weights
    if start not in (True, False, "gaussian", "orthogonal"):
        raise AdapterUnsupported(
            f"init_lora_weights={start!r} is not supported, because it changes body weights: use True, False, 'gaussian' or 'orthogonal'"
        )
    if config.use_dora and start in (False, "orthogonal"):
        raise AdapterUnsupported(
            f"use_dora=True with init_lora_weights={start!r} is not supported, because its magnitudes would start from weights and random numbers "
            "together: use init_lora_weights=True or 'gaussian'"
        )


def _check_prompt_learning(config: PeftConfig) -> None:
    tokens = getattr(config, "num_virtual_tokens", None)
    if kind_of(config) != "CPT" and (not isinstance(tokens, int) or not 0 < tokens <= MAX_PROMPT_TOKENS):
        raise AdapterUnsupported(f"num_virtual_tokens of {type(config).__name__} must be from 1 to {MAX_PROMPT_TOKENS}, got {tokens!r}")


def resolve(config: PeftConfig, modules: Sequence[str], prefix: str, extra: Mapping[str, Any] | None = None) -> AdapterSpec:
    """The plain configuration that travels.

    Args:
        config: of a type in ``TUNERS``.
        modules: the targets inside the blocks, each as ``"<block>.<name within>"``.
        prefix: what the full names of the blocks' modules begin with.
        extra: more plain fields, such as modules that PEFT copies whole.
    """
    tuner = TUNERS[kind_of(config)]
    names = sorted(modules)
    fields = {name: _plain_value(getattr(config, name)) for name in tuner.fields}
    if tuner.dropout is not None and getattr(config, tuner.dropout):
        fields[tuner.dropout] = float(getattr(config, tuner.dropout))
    patterns = {}
    for field in tuner.patterns:
        given = getattr(config, field) or {}
        keys = {name: get_pattern_key(list(given), prefix + name) for name in names} if given else {}
        patterns[field] = {name: _plain_value(given[key]) for name, key in keys.items() if key in given}
    return AdapterSpec.of({"peft_type": kind_of(config), "modules": names, "fields": fields, "patterns": patterns, **(extra or {})})


def _plain_value(value: Any) -> Any:
    value = getattr(value, "value", value)  # enums travel as their values
    if isinstance(value, float) and not math.isfinite(value):
        raise AdapterUnsupported(f"an adapter's configuration holds {value}, expected a finite number")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise AdapterUnsupported(f"an adapter's configuration holds {value!r:.80}, which is no plain value")


def rebuild(spec: AdapterSpec, prefix: str, only: range | None = None) -> PeftConfig:
    """The PEFT configuration that a peer's plain one stands for, every field checked.

    Args:
        spec: what came.
        prefix: what the full names of the blocks' modules begin with here.
        only: keep the targets in these blocks.

    Raises:
        WireError: an unknown type, or fields that do not fit.
    """
    kind, modules = spec.config.get("peft_type"), spec.config.get("modules")
    if not isinstance(kind, str) or kind not in TUNERS:
        raise WireError(f"adapters of type {str(kind)[:40]!r} are not supported by this server: it knows {', '.join(sorted(TUNERS))}")
    if unknown := set(spec.config) - {*SPEC_FIELDS, *_EXTRA.get(kind, ())}:
        raise WireError(f"an adapter configuration holds a field that this server does not know: {sorted(unknown)[0]!r:.80}")
    copied = _names(spec.config.get("copied", []))
    names = _names(modules)
    if not names and not copied:
        raise WireError("an adapter configuration must name its modules")
    _check_apart(names, copied)
    tuner, schema = TUNERS[kind], PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    allowed = {*tuner.fields, *((tuner.dropout,) if tuner.dropout else ())}
    fields, patterns = spec.config.get("fields"), spec.config.get("patterns")
    if not isinstance(fields, dict) or not isinstance(patterns, dict) or set(patterns) - set(tuner.patterns):
        raise WireError("an adapter configuration must hold fields and patterns that its type has")
    if unknown := set(fields) - allowed:
        raise WireError(f"an adapter configuration holds a field that this server does not know: {sorted(unknown)[0]!r:.80}")
    hints = typing.get_type_hints(schema)
    given = {name: _checked(name, value, hints[name], tuner.bounds.get(name, MAX_COUNT)) for name, value in fields.items()}
    for field, values in patterns.items():
        given[field] = _checked_pattern(field, values, names, prefix, only)
    kept = [name for name in names if only is None or int(name.partition(".")[0]) in only]
    given["target_modules"] = [prefix + name for name in kept]
    if copied:
        given["modules_to_save"] = [_Name(prefix + name) for name in copied if only is None or int(name.partition(".")[0]) in only]
    if schema is IA3Config:
        given["feedforward_modules"] = [prefix + name for name in _names(spec.config.get("feedforward", [])) if name in set(kept)]
    if schema is AdaLoraConfig:
        given["total_step"] = 1
    if kind == "ADAPTION_PROMPT":
        given["target_modules"] = None  # PEFT knows the attention of the models that it takes
    if kind == "LILY":
        suffixes = spec.config.get("suffixes")
        if (
            not isinstance(suffixes, list)
            or not 0 < len(suffixes) <= 64
            or not all(isinstance(name, str) and _SUFFIX.fullmatch(name) for name in suffixes)
        ):
            raise WireError("LILY needs the ends of its modules' names, up to 64 of letters, digits, dots and underscores")
        given["target_modules"] = suffixes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's advice is for whoever wrote the configuration
            return schema(**given)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise WireError(f"PEFT refuses the adapter configuration: {str(error)[:200]}") from error


def _names(value: object) -> list[str]:
    if not isinstance(value, list) or len(value) > MAX_MODULES or not all(isinstance(name, str) and _MODULE_NAME.fullmatch(name) for name in value):
        raise WireError(
            f"an adapter's modules must be at most {MAX_MODULES} names of letters, digits, dots and underscores, each after its block's number"
        )
    if value != sorted(set(value)):
        raise WireError("an adapter configuration must list its modules sorted, each once")
    return value


def _checked_pattern(field: str, values: object, names: Sequence[str], prefix: str, only: range | None) -> dict[str, Any]:
    """Values by full module name, as PEFT's own patterns."""
    if not isinstance(values, dict) or not set(values) <= set(names):
        raise WireError(f"{field} must give values to modules of the adapter")
    for value in values.values():
        if type(value) not in (int, float) or not abs(value) <= MAX_COUNT or ("alpha" not in field and "lambda" not in field and value < 1):
            raise WireError(f"{field} holds {value!r:.40}, expected numbers up to {MAX_COUNT}")
    return {_Name(prefix + name): value for name, value in values.items() if only is None or int(name.partition(".")[0]) in only}


def _check_apart(names: Sequence[str], copied: Sequence[str]) -> None:
    """PEFT targets nothing inside of what it copies whole."""
    whole = set(copied)
    for name in names:
        parts = name.split(".")
        if any(".".join(parts[:count]) in whole for count in range(2, len(parts) + 1)):
            raise WireError(f"module {name} of an adapter configuration lies in one that is copied whole")


def _checked(name: str, value: Any, hint: Any, limit: int) -> Any:
    """A field's value, when its type fits the field and its size is bounded."""
    kinds = _scalar_types(hint)
    if int in kinds and ("alpha" in name or "scal" in name):
        kinds.add(float)  # PEFT says that they are whole, and computes with any number
    if type(value) not in kinds and not (type(value) is int and float in kinds):
        raise WireError(f"{name} of an adapter configuration must be {' or '.join(sorted(kind.__name__ for kind in kinds))}, got {value!r:.60}")
    seed = "seed" in name
    if type(value) is int and not (abs(value) < 1 << 63 if seed else -1 <= value <= limit):
        raise WireError(f"{name} of an adapter configuration must be at most {limit}, got {value!r:.60}")
    if type(value) is float and not (math.isfinite(value) and abs(value) <= 1e6):
        raise WireError(f"{name} of an adapter configuration must be a number of at most 1e6, got {value!r:.60}")
    if type(value) is str and not _WORD.fullmatch(value):
        raise WireError(f"{name} of an adapter configuration must be a word, got {value!r:.60}")
    if (
        name in ("r", "init_r", "u", "block_size", "n_frequency", "num_vectors", "vector_length", "theta_d_length")
        and type(value) is int
        and value < 0
    ):
        raise WireError(f"{name} of an adapter configuration must not be negative, got {value}")
    return value


def _scalar_types(hint: Any) -> set[type]:
    """The plain types in an annotation such as ``Optional[Union[int, Literal["a"]]]``."""
    if typing.get_origin(hint) is typing.Literal:
        return {type(value) for value in typing.get_args(hint)}
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return set().union(*(_scalar_types(part) for part in typing.get_args(hint)))
    if hint in (bool, int, float, str, type(None)):
        return {hint}
    return {str} if isinstance(hint, type) else {bool, int, float, str, type(None)} if hint is Any else set()
