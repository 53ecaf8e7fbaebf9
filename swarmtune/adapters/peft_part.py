"""The part of an adapter that PEFT defines: made by PEFT over the client's own model, loaded and exported in PEFT's format."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from swarmtune.adapters.injection import (
    ADAPTER_NAME,
    PEFT_PREFIX,
    TunerTensor,
    derived,
    fresh,
    inject,
    named_tensors,
    plain_name,
    plain_names,
    put,
    spec_of,
    travels,
    tuner_tensors,
)
from swarmtune.adapters.parts import Initial, check_fit, read_fields
from swarmtune.adapters.tuners import CACHE_PREFIX, PROMPT_LEARNING, TUNERS, check_supported, kind_of
from swarmtune.errors import AdapterUnsupported, UsageError
from swarmtune.skeleton import LayerSite
from swarmtune.types import Kwarg
from swarmtune.wire.messages import AdapterSpec

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


class PeftPart:
    """What a PEFT type learns, without the body around it.

    Attributes:
        config: the ``PeftConfig``.
        spec: what travels to the servers; ``None`` where everything of it is on the client.
        parameters: what learns, under PEFT's names and in PEFT's order.
        frozen: tensors that the tuner needs and does not train, by name.
        wrapped: for virtual tokens, the ``PeftModel`` whose forward prepares them.
    """

    def __init__(
        self, model: PreTrainedModel, site: LayerSite, config: PeftConfig, model_name: str, initial: Initial | None = None, saved: Path | None = None
    ) -> None:
        """Let PEFT put its layers into ``model`` and take what it brought.

        Args:
            model: the client's model; weights of its blocks may be weightless.
            site: where it keeps its layers.
            config: what to make.
            model_name: for the exported configuration.
            initial: asks the servers for values that depend on body weights; without it they are what PEFT makes of no weights.
            saved: a PEFT directory whose values to take.

        Raises:
            AdapterUnsupported: the type, one of its settings or its targets.
            UsageError: what is saved does not fit.
        """
        check_supported(config)
        self.config = copy.deepcopy(config)
        self.config.base_model_name_or_path = model_name
        self.config.inference_mode = False  # what is given here is trained
        self.config.task_type = self.config.task_type or "CAUSAL_LM"
        self._model_config = model.config
        self._prefix = site.prefix
        self.spec: AdapterSpec | None = None
        self.parameters: dict[str, nn.Parameter] = {}
        self.frozen: dict[str, Tensor] = {}
        self._travel: list[tuple[str, str, int, int]] = []
        self.wrapped: PeftModel | None = None
        self._tuner: Any = None
        if self.kind in PROMPT_LEARNING:
            self._make_prompts(model, saved)
        else:
            self._make_tuner(model, site, initial, saved)

    @property
    def kind(self) -> str:
        """PEFT's name of the type."""
        return kind_of(self.config)

    @property
    def is_cache_prefix(self) -> bool:
        """Whether it trains keys and values before those of each block."""
        return self.kind in CACHE_PREFIX

    @property
    def dropout(self) -> float:
        """Of adapter layers inside the blocks, which servers seed."""
        field = None if self.kind in PROMPT_LEARNING else TUNERS[self.kind].dropout
        return float(getattr(self.config, field) or 0.0) if field and self.spec is not None else 0.0

    @property
    def mixes_rows(self) -> bool:
        """Whether a batch must not be cut into micro-batches."""
        return self.kind in TUNERS and TUNERS[self.kind].mixes_rows

    def check_trains(self) -> None:
        """Refuse to train what would not be trained as PEFT trains it.

        Raises:
            AdapterUnsupported: with the reason.
        """
        if self.kind in TUNERS and self.spec is not None and not TUNERS[self.kind].trains:
            raise AdapterUnsupported(f"adapters of type {self.kind} can be used and not trained through a swarm, because {TUNERS[self.kind].why}")
        if self.kind == "CPT" and self.config.inference_mode:
            raise AdapterUnsupported(
                "a saved adapter of type CPT can be used and not trained further, because PEFT saves the sum of the examples' tokens and their "
                "changes, and its bounds are those of the changes: start from the configuration again"
            )

    def _make_tuner(self, model: PreTrainedModel, site: LayerSite, initial: Initial | None, saved: Path | None) -> None:
        plain = plain_names(model)
        rng = torch.get_rng_state() if TUNERS[self.kind].draws else None
        # PEFT adds both names of a classifier's head by itself, of which a model has one.
        copied = [name for name in getattr(self.config, "modules_to_save", None) or () if name not in ("classifier", "score")]
        injected = inject(model, self.config)
        wrappers = [name for name, module in injected.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        for name in copied:
            if not any(f".{wrapper}".endswith(f".{name}") for wrapper in wrappers):
                raise AdapterUnsupported(
                    f"modules_to_save names {name!r}, and {type(model).__name__} has no such module that PEFT could copy: leave it out"
                )
        self.config = injected.peft_config[ADAPTER_NAME]  # with what PEFT resolved
        for name, parameter in injected.named_parameters():
            if ".ranknum." in name:  # AdaLoRA's constant, which PEFT lets learn over half precision and never saves
                parameter.requires_grad_(False)
        _unfold(parameter for parameter in injected.parameters() if parameter.requires_grad)
        _learn_in_float32(injected, site)  # before any value is put in, so that none is rounded
        tensors = tuner_tensors(model, site, plain)
        self.spec = spec_of(injected, self.config, site)
        if initial is not None and self.spec is not None:
            self._derive(tensors, initial, rng)
        if saved is not None:
            load_into(injected, saved)
            tensors = tuner_tensors(model, site, plain)
            self.spec = spec_of(injected, self.config, site)
        names = {id(tensor): name for name, tensor in reversed(list(named_tensors(injected)))}
        self.parameters = {name: parameter for name, parameter in injected.named_parameters() if parameter.requires_grad}
        self._stand_in(site, plain, initial if saved is None else None)
        for item in tensors if self.spec is not None else ():
            assert self.spec is not None
            if not travels(self.spec, item):
                continue
            name = names[id(item.tensor)]
            if name not in self.parameters:
                self.frozen[name] = item.tensor.detach()
            self._travel.append((f"peft.{self.spec.digest}.{item.name}", name, item.start, item.stop))
        if self.kind == "ADALORA":
            self._tuner = injected.base_model

    def _stand_in(self, site: LayerSite, plain: frozenset[str], initial: Initial | None) -> None:
        """Give parameters of the blocks themselves that PEFT trains (biases) stand-ins: with the servers' values, or with saved ones."""
        places = {}
        for name in self.parameters:
            own = plain_name(name.removeprefix(PEFT_PREFIX))
            if own in plain and (place := site.split(own)) is not None:
                places[name] = place
        values = None
        if places and initial is not None:
            shapes = [tuple(self.parameters[name].shape) for name in places]
            values = initial([(block, f"param.{within}") for block, within in places.values()], shapes)
        for index, (name, (block, within)) in enumerate(places.items()):
            value = self.parameters[name].detach() if values is None else values[index]
            self.parameters[name] = nn.Parameter(value.float() if value.dtype in (torch.float16, torch.bfloat16) else value)
            self._travel.append((f"param.{within}", name, block, block + 1))

    def _derive(self, tensors: list[TunerTensor], initial: Initial, rng: Tensor | None) -> None:
        """Ask the servers for what PEFT computes from body weights."""
        wanted = [item for item in tensors if derived(self.config, next(iter(item.places.values()))[0].removesuffix(f".{ADAPTER_NAME}"))]
        if wanted:
            values = initial([(item.start, item.name) for item in wanted], [tuple(item.tensor.shape) for item in wanted], self.spec, rng)
            with torch.no_grad():
                for item, value in zip(wanted, values, strict=True):
                    item.tensor.copy_(value)

    def _make_prompts(self, model: PreTrainedModel, saved: Path | None) -> None:
        self.config.inference_mode = saved is not None  # what PEFT saves of an encoder is its output, which is trained on as it is
        wrapped = inject(model, self.config)
        encoder: Any = wrapped.prompt_encoder[ADAPTER_NAME]
        if saved is not None:
            load_into(wrapped, saved)
            encoder.requires_grad_(self.kind == "MULTITASK_PROMPT_TUNING")  # all of which is saved
            (encoder.trainable_embedding if self.kind == "CARTRIDGE" else encoder.embedding.weight).requires_grad_(True)
        self.parameters = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
        if self.is_cache_prefix:
            whole = wrapped.get_prompt
            # All rows get the same keys and values, so one row of them travels.
            wrapped.get_prompt = lambda batch_size, task_ids=None, max_cache_len=None: whole(1, task_ids, max_cache_len)  # type: ignore[method-assign, assignment]
        self.wrapped = wrapped

    def attach(self, root: nn.Module) -> None:
        """Let PEFT's own training rules work on the parameters below ``root``, whose names begin where the model's do."""
        if self._tuner is not None:
            self._tuner.model = root
            self._tuner.rankallocator = type(self._tuner.rankallocator)(root, self._tuner.peft_config[ADAPTER_NAME], ADAPTER_NAME)
            self._tuner.peft_config[ADAPTER_NAME] = self.config
            self._tuner.rankallocator.peft_config = self.config

    def regularise(self) -> Callable[[Any], Any] | None:
        """What PEFT adds to an output's loss; ``None`` where it adds nothing."""
        return cast(Callable[[Any], Any], self._tuner) if self._tuner is not None else None

    def after_step(self, step: int) -> None:
        """PEFT's rule for the end of an optimizer step, gradients still there: AdaLoRA moves ranks between modules."""
        grads = [parameter.grad for parameter in self.parameters.values()]
        # A loss scaler skips steps whose gradients are not finite, and so does the rule.
        if self._tuner is not None and all(grad is not None and bool(torch.isfinite(grad).all()) for grad in grads):
            self._tuner.update_and_allocate(step)

    def rule_state(self) -> dict[str, Any]:
        """What the rule remembers, for a checkpoint."""
        if self._tuner is None:
            return {}
        allocator = self._tuner.rankallocator
        return {
            "rank_pattern": cast(Any, self.config).rank_pattern,
            **{name: dict(getattr(allocator, name)) for name in ("ipt", "exp_avg_ipt", "exp_avg_unc")},
        }

    def load_rule_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        if self._tuner is not None and state:
            cast(Any, self.config).rank_pattern = state["rank_pattern"]
            for name in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
                setattr(self._tuner.rankallocator, name, dict(state[name]))

    def kwargs(self, tensors: Mapping[str, Tensor]) -> list[Kwarg]:
        """How ``tensors``, what learns and what is frozen by name, travel."""
        return [Kwarg(wire, tensors[name], blocks=f"{start}:{stop}") for wire, name, start, stop in self._travel]

    def write(self, directory: Path, values: Mapping[str, Tensor]) -> None:
        """Write a PEFT directory, then let PEFT load it into a fresh model and compare every value.

        Raises:
            UsageError: PEFT would not load the same adapter from it.
        """
        stored = self._to_file(values)
        save_file(stored, directory / WEIGHTS_FILE, metadata={"format": "pt"})
        config = copy.deepcopy(self.config)
        config.inference_mode = True
        config.save_pretrained(str(directory))
        os.chmod(directory / WEIGHTS_FILE, (directory / CONFIG_FILE).stat().st_mode & 0o777)  # safetensors lets nobody else read its files
        self._check(directory, stored)

    def read(self, directory: Path) -> dict[str, Tensor]:
        """The values of a PEFT directory of the same type and shapes, by our names.

        Raises:
            UsageError: it cannot be read, or does not fit.
        """
        if self.wrapped is not None:
            own = {name: tuple(tensor.shape) for name, tensor in self._to_file({}).items()}
            stored = read_weights(directory)
            check_fit(directory, own, stored)
            of_prompts = [name for name in self.parameters if name.startswith("prompt_encoder.")]
            if of_prompts != [f"prompt_encoder.{ADAPTER_NAME}.embedding.weight"]:
                raise UsageError(
                    f"{directory} holds the virtual tokens that were made, not what makes them: load the model with that directory as its adapter"
                )
            own_name = f".modules_to_save.{ADAPTER_NAME}"
            return {name: stored["prompt_embeddings" if name in of_prompts else name.replace(own_name, "")] for name in self.parameters}
        model = self._fresh()
        load_into(model, directory)
        loaded = dict(named_tensors(model))
        for name, parameter in self.parameters.items():
            if loaded[name].shape != parameter.shape:
                raise UsageError(f"the adapter in {directory} does not fit: {name} is {tuple(loaded[name].shape)}, expected {tuple(parameter.shape)}")
        return {name: loaded[name].detach() for name in self.parameters}

    def _fresh(self) -> PeftModel:
        return fresh(self._model_config, self.config)

    def _to_file(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What PEFT would save, by its own rules."""
        if self.wrapped is not None:
            stored = get_peft_model_state_dict(self.wrapped, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
        else:
            model = self._fresh()
            put(model, {**self.frozen, **values})
            every = dict(named_tensors(model))
            state = {name: every[name] for name in model.state_dict() if name in every}
            stored = get_peft_model_state_dict(model, state_dict=state, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
        lost = [name for name, tensor in stored.items() if tensor.is_meta]
        if lost:
            raise UsageError(f"the adapter cannot be exported: PEFT wants to save {lost[0]}, which has no value here")
        return {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in stored.items()}

    def _check(self, directory: Path, stored: Mapping[str, Tensor]) -> None:
        config = PeftConfig.from_pretrained(str(directory))
        if self.wrapped is not None:
            again: Mapping[str, Tensor] = read_weights(directory)
        else:
            config.inference_mode = False
            model = fresh(self._model_config, config)
            load_into(model, directory)
            loaded = dict(named_tensors(model))
            state = {name: loaded[name] for name in model.state_dict() if name in loaded}
            again = get_peft_model_state_dict(model, state_dict=state, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
        wrong = [name for name in stored if name not in again or again[name].is_meta or not torch.equal(again[name], stored[name])]
        if wrong or set(again) != set(stored):
            first = (wrong + sorted(set(again) ^ set(stored)))[0]
            raise UsageError(f"the exported adapter would not load as it is ({first}): nothing was written")


def load_into(model: PeftModel, directory: Path) -> None:
    """Let PEFT load a directory into ``model``, after a check that it holds exactly what this adapter has.

    Raises:
        UsageError: it cannot be read, or does not fit.
    """
    stored = read_weights(directory)
    config: Any = model.peft_config[ADAPTER_NAME]
    every = dict(named_tensors(model))
    state = {name: every[name] for name in model.state_dict() if name in every}
    pattern = getattr(config, "rank_pattern", None) if kind_of(config) == "ADALORA" else None
    if pattern is not None:
        config.rank_pattern = None  # shapes before PEFT cuts them
    own = get_peft_model_state_dict(
        model, state_dict=None if config.is_prompt_learning else state, adapter_name=ADAPTER_NAME, save_embedding_layers=False
    )
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    if pattern is not None:
        config.rank_pattern = pattern
        expected = {name: tuple(stored[name].shape) if name in stored else shape for name, shape in expected.items()}
    stored = _without_base(model, directory, stored, expected)
    check_fit(directory, expected, stored)
    _unfold(every[name] for name in own if name in every)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result: Any = set_peft_model_state_dict(model, stored, adapter_name=ADAPTER_NAME)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise UsageError(f"the adapter in {directory} does not fit: {str(error).splitlines()[0][:300]}") from error
    if result.unexpected_keys and not config.is_prompt_learning:
        raise UsageError(f"the adapter in {directory} does not fit: it holds {result.unexpected_keys[0]}, which this adapter does not have")


def _unfold(tensors: Iterable[Tensor]) -> None:
    """Give weightless parameters of the body that learn (biases) memory of their own."""
    for tensor in tensors:
        if tensor.untyped_storage().nbytes() < tensor.nbytes:
            tensor.data = torch.zeros(tensor.shape, dtype=tensor.dtype)


def _learn_in_float32(model: nn.Module, site: LayerSite) -> None:
    """Let what PEFT trains as a copy (norms, heads, biases) learn in float32 over half precision.

    Servers cast to the type that they compute in. In stem and head the module computes in float32 and gives back the type that it got.
    """
    for place, module in model.named_modules():
        own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
        learning = [parameter for parameter in own.values() if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16)]
        inside = site.split(place.removeprefix(PEFT_PREFIX)) is not None
        if not learning or (not inside and isinstance(module, nn.ParameterDict)):
            continue  # what a tuner holds in stem or head by itself is cast by its layer
        dtype = learning[0].dtype
        for parameter in learning:
            parameter.data = parameter.data.float()
        if inside:
            continue
        for name, parameter in own.items():
            if not parameter.requires_grad and parameter.dtype is dtype:  # a copy: it may be tied to another module's
                module._parameters[name] = nn.Parameter(parameter.detach().float(), requires_grad=False)
        module.register_forward_pre_hook(_widen)
        module.register_forward_hook(functools.partial(_narrow, dtype))


def _widen(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.float() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)


def _narrow(dtype: torch.dtype, module: nn.Module, args: Any, output: Any) -> Any:
    return output.to(dtype) if isinstance(output, Tensor) and output.is_floating_point() else output


def _without_base(model: PeftModel, directory: Path, stored: Mapping[str, Tensor], expected: Mapping[str, Any]) -> dict[str, Tensor]:
    """Leave out copies of the model's own embeddings and head, which PEFT saves where they are targets.

    Raises:
        UsageError: they are not the model's: its vocabulary was changed, say.
    """
    own = {plain_name(name): tensor for name, tensor in named_tensors(model)}
    kept = {}
    for name, tensor in stored.items():
        base = None if name in expected else own.get(plain_name(name))
        if base is None:
            kept[name] = tensor
        elif base.shape != tensor.shape or (base.untyped_storage().nbytes() >= base.nbytes and not torch.equal(base, tensor.to(base.dtype))):
            raise UsageError(
                f"the adapter in {directory} brings other weights for {name} than the model has: train on the model that it was made for"
            )
    return kept


def read_weights(directory: Path) -> dict[str, Tensor]:
    """The tensors of a PEFT directory.

    Raises:
        UsageError: there are none, or they cannot be read.
    """
    path = directory.expanduser() / WEIGHTS_FILE
    if not path.is_file():
        raise UsageError(f"there is no {WEIGHTS_FILE} in {directory}: swarmtune reads safetensors only")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is not a whole safetensors file: {error}") from error


def read_config(directory: Path) -> PeftConfig:
    """The configuration of a PEFT directory.

    Raises:
        UsageError: it cannot be read.
        AdapterUnsupported: it is none that this PEFT knows whole.
    """
    path = directory / CONFIG_FILE
    fields = read_fields(path)
    kind = fields.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise AdapterUnsupported(f"{path} is not a PEFT configuration: its peft_type is {kind!r:.80}")
    known = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)])} | {"runtime_config"}
    for name, value in fields.items():
        if name not in known and value not in (None, False, "", [], {}):  # PEFT would leave it out with a warning
            raise AdapterUnsupported(f"{path} holds {name[:80]!r}, which this version of PEFT does not know: it was made by a newer one")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftConfig.from_pretrained(str(directory))
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, RecursionError) as error:
        raise AdapterUnsupported(f"{path} is not a PEFT configuration: {(str(error) or type(error).__name__).splitlines()[0][:300]}") from error
