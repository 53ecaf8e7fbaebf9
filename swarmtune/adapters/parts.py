"""What one adapter is made of: each part owns leaf parameters under its own names, says how they travel, and has files of its own."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PretrainedConfig

from swarmtune.errors import AdapterUnsupported, UsageError, WireError
from swarmtune.skeleton import LayerSite, build_skeleton, hidden_size
from swarmtune.types import Kwarg
from swarmtune.wire.frames import dump_json, parse_json
from swarmtune.wire.messages import AdapterSpec

MAX_PROMPT_TOKENS = 1 << 14
MAX_CONFIG_BYTES = 1 << 20


class Initial(Protocol):
    """Asks the servers for first values: of tensors of a tuner, or of parameters of the body."""

    def __call__(
        self, names: Sequence[tuple[int, str]], shapes: Sequence[tuple[int, ...]], spec: AdapterSpec | None = None, rng: Tensor | None = None
    ) -> list[Tensor]:
        """One tensor of the given shape for each block and name (``param.<name>``, or a tuner's as it travels), in order."""


@dataclass(frozen=True)
class DeepPromptConfig:
    """Deep prompts: virtual positions to the left of the text, to which each block adds a prompt of its own.

    They are prepended to the embeddings as zeros with mask 1 (learned positions shift), and removed before the head. This is no PEFT type:
    ``PeftModel`` cannot load them (arXiv:2110.07602 describes the idea; PEFT's prefix tuning learns keys and values instead).

    Attributes:
        num_tokens: virtual positions.
        init_std: standard deviation of the first values; the model's ``initializer_range`` where not given.
        trainable: whether they learn; frozen ones still act.
    """

    num_tokens: int
    init_std: float | None = None
    trainable: bool = True
    FILE: ClassVar[str] = "deep_prompts"

    def __post_init__(self) -> None:
        if type(self.num_tokens) is not int or not 0 < self.num_tokens <= MAX_PROMPT_TOKENS:
            raise AdapterUnsupported(f"num_tokens of deep prompts must be an integer from 1 to {MAX_PROMPT_TOKENS}, got {self.num_tokens!r}")
        if self.init_std is not None and (type(self.init_std) not in (int, float) or not 0 <= self.init_std < math.inf):
            raise AdapterUnsupported(f"init_std of deep prompts must be a number of at least 0, got {self.init_std!r}")
        _need_bool(self.trainable, "trainable")


@dataclass(frozen=True)
class StandInConfig:
    """Parameters of the frozen blocks that learn: each gets a stand-in that starts from its value on the servers.

    Attributes:
        parameters: names within a block, or shell patterns of them: ``["*bias"]`` is BitFit (arXiv:2106.10199), ``["*layernorm*"]`` all norms.
        layers: block numbers; all where not given.
        trainable: whether they learn.
    """

    parameters: Sequence[str]
    layers: Sequence[int] | None = None
    trainable: bool = True
    FILE: ClassVar[str] = "stand_in"

    def __post_init__(self) -> None:
        if isinstance(self.parameters, str) or not self.parameters or not all(isinstance(name, str) and name for name in self.parameters):
            raise AdapterUnsupported(f"parameters of stand-ins must be a list of names or patterns, such as ['*bias'], got {self.parameters!r}")
        if self.layers is not None and (not self.layers or not all(type(layer) is int and layer >= 0 for layer in self.layers)):
            raise AdapterUnsupported(f"layers of stand-ins must be block numbers, got {self.layers!r}")
        object.__setattr__(self, "parameters", tuple(self.parameters))
        object.__setattr__(self, "layers", None if self.layers is None else tuple(self.layers))
        _need_bool(self.trainable, "trainable")


@dataclass(frozen=True)
class HeadConfig:
    """The model's head learns, in full; it is here, so nothing of it travels.

    Beside a PEFT configuration, ``modules_to_save`` of that configuration does the same and is saved in PEFT's format.

    Attributes:
        trainable: whether it learns.
    """

    trainable: bool = True
    FILE: ClassVar[str] = "head"

    def __post_init__(self) -> None:
        _need_bool(self.trainable, "trainable")


OwnConfig = DeepPromptConfig | StandInConfig | HeadConfig
OWN_CONFIGS: tuple[type[OwnConfig], ...] = (DeepPromptConfig, StandInConfig, HeadConfig)


def _need_bool(value: object, name: str) -> None:
    if not isinstance(value, bool):
        raise AdapterUnsupported(f"{name} must be true or false, got {value!r}")


class OwnPart:
    """A part in swarmtune's own format: ``<FILE>.safetensors`` and ``<FILE>_config.json``.

    Attributes:
        config: what it was made from.
        parameters: what it owns, by name.
    """

    def __init__(self, config: OwnConfig, parameters: Mapping[str, nn.Parameter]) -> None:
        self.config = config
        self.parameters = dict(parameters)
        for parameter in self.parameters.values():
            parameter.requires_grad_(config.trainable)

    def kwargs(self, parameters: Mapping[str, Tensor]) -> list[Kwarg]:
        """How ``parameters``, its own by name, travel; nothing where the part acts on the client."""
        return []

    def check_attached(self) -> None:
        """Refuse to go on where the model does not use the part's parameters any more.

        Raises:
            UsageError: it does not.
        """

    def write(self, directory: Path, values: Mapping[str, Tensor]) -> None:
        """Write both files."""
        save_file(
            {name: values[name].contiguous() for name in self.parameters}, directory / f"{self.config.FILE}.safetensors", metadata={"format": "pt"}
        )
        text = dump_json({"format": "swarmtune", "kind": self.config.FILE, **dataclasses.asdict(self.config)})
        (directory / f"{self.config.FILE}_config.json").write_bytes(text + b"\n")

    def read(self, directory: Path) -> dict[str, Tensor]:
        """The values in a directory, checked against what this part has.

        Raises:
            UsageError: missing, superfluous or misshapen tensors.
        """
        path = directory / f"{self.config.FILE}.safetensors"
        if not path.is_file():
            raise UsageError(f"there is no {path.name} in {directory}")
        try:
            stored = load_file(path)
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path} is not a whole safetensors file: {error}") from error
        check_fit(path, {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}, stored)
        return stored


def check_fit(source: Path, own: Mapping[str, tuple[int, ...]], stored: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not exactly the own ones.

    Raises:
        UsageError: with the first that does not fit.
    """
    missing, extra = sorted(set(own) - set(stored)), sorted(set(stored) - set(own))
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"holds {extra[0]}, which this adapter does not have"
        raise UsageError(f"the adapter in {source} does not fit: it {what} (are its rank and target_modules the same?)")
    for name, shape in own.items():
        if tuple(stored[name].shape) != shape:
            raise UsageError(f"the adapter in {source} does not fit: {name} is {tuple(stored[name].shape)}, expected {shape}")


class DeepPrompts(OwnPart):
    """One tensor ``deep_prompts`` of shape (blocks, tokens, hidden)."""

    def __init__(self, config: DeepPromptConfig, model_config: PretrainedConfig, site: LayerSite) -> None:
        text = model_config.get_text_config()
        std = config.init_std if config.init_std is not None else float(getattr(text, "initializer_range", 0.02))
        value = torch.randn(site.num_blocks, config.num_tokens, hidden_size(model_config)) * std
        super().__init__(config, {"deep_prompts": nn.Parameter(value)})
        self.num_tokens, self._blocks = config.num_tokens, site.num_blocks

    def kwargs(self, parameters: Mapping[str, Tensor]) -> list[Kwarg]:
        """A ``prompt`` for each block."""
        return [Kwarg("prompt", prompt, blocks=block) for block, prompt in enumerate(parameters["deep_prompts"].unbind(0))]


class StandIns(OwnPart):
    """One tensor for each parameter of a block that learns, float32, under its full name behind ``param.``."""

    def __init__(self, config: StandInConfig, model_config: PretrainedConfig, site: LayerSite, initial: Initial | None) -> None:
        self._places = _matching(config, model_config, site)
        names = list(self._places.values())
        skeleton = dict(build_skeleton(model_config).named_parameters())
        shapes = [tuple(skeleton[f"{site.prefix}{block}.{name}"].shape) for block, name in names]
        asked = [(block, f"param.{name}") for block, name in names]
        values = [torch.zeros(shape) for shape in shapes] if initial is None else initial(asked, shapes)
        super().__init__(config, {name: nn.Parameter(value.float()) for name, value in zip(self._places, values, strict=True)})

    def kwargs(self, parameters: Mapping[str, Tensor]) -> list[Kwarg]:
        """A ``param.<name>`` for each."""
        return [Kwarg(f"param.{within}", parameters[name], blocks=block) for name, (block, within) in self._places.items()]


def _matching(config: StandInConfig, model_config: PretrainedConfig, site: LayerSite) -> dict[str, tuple[int, str]]:
    """Block and name within it of every parameter that the configuration names."""
    found, within_any = {}, set()
    matched: set[str] = set()
    for layer in config.layers or ():
        if layer >= site.num_blocks:
            raise AdapterUnsupported(f"layers of stand-ins name block {layer}, the model has blocks 0:{site.num_blocks}")
    for name, _ in build_skeleton(model_config).named_parameters():
        place = site.split(name)
        if place is None:
            continue
        within_any.add(place[1])
        patterns = {pattern for pattern in config.parameters if fnmatch.fnmatchcase(place[1], pattern)}
        matched |= patterns
        if patterns and (config.layers is None or place[0] in config.layers):
            found[f"param.{name}"] = place
    for pattern in config.parameters:
        if pattern not in matched:
            raise AdapterUnsupported(f"no parameter of a block matches {pattern!r}: a block has {', '.join(sorted(within_any))[:800]}")
    return found


class Head(OwnPart):
    """Copies of the head's parameters, which take their place in the model."""

    def __init__(self, config: HeadConfig, model: nn.Module, head: nn.Module | None, name: str) -> None:
        if head is None or not name:
            raise AdapterUnsupported("this model has no head that could learn: leave HeadConfig out")
        if isinstance(head, BaseTunerLayer | AuxiliaryTrainingWrapper):
            raise AdapterUnsupported(f"the PEFT configuration and HeadConfig both train the head {name}: use one of them")
        super().__init__(config, {})
        for leaf, parameter in list(head.named_parameters(recurse=False)):
            value = parameter.detach().float() if parameter.dtype in (torch.float16, torch.bfloat16) else parameter.detach().clone()
            self.parameters[f"head.{name}.{leaf}"] = nn.Parameter(value, requires_grad=config.trainable)
        self._module = head

    def check_attached(self) -> None:
        """See ``OwnPart``: the head may have been resized, or tied to the embeddings again."""
        for name, parameter in self.parameters.items():
            if getattr(self._module, name.rpartition(".")[2]) is not parameter:
                raise UsageError(
                    f"{name} is not the model's head any more (resize_token_embeddings or tie_weights?): load the model with HeadConfig again"
                )

    def attach(self) -> None:
        """Put the copies into the model; inputs are cast to their type."""
        for name, parameter in self.parameters.items():
            setattr(self._module, name.rpartition(".")[2], parameter)
        dtype = next(iter(self.parameters.values())).dtype

        def cast(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0].to(dtype), *args[1:])

        self._module.register_forward_pre_hook(cast)


def read_fields(path: Path) -> dict[str, Any]:
    """The JSON object in a configuration file.

    Raises:
        UsageError: there is none.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise UsageError(f"{path} is too large for a configuration")
        return parse_json(path.read_bytes())
    except (OSError, WireError) as error:
        raise UsageError(f"{path} cannot be read: {str(error).replace('a header', 'it')}") from error


def read_own_config(directory: Path, kind: type[OwnConfig]) -> OwnConfig | None:
    """The configuration of a part that a directory holds; ``None`` where it holds none of that kind.

    Raises:
        UsageError: it cannot be read.
    """
    path = directory / f"{kind.FILE}_config.json"
    if not path.is_file():
        return None
    fields = read_fields(path)
    if fields.pop("format", None) != "swarmtune" or fields.pop("kind", None) != kind.FILE:
        raise UsageError(f"{path} is not a configuration of swarmtune's {kind.FILE}")
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(set(fields) - known):
        raise UsageError(f"{path} holds {unknown[0]!r}, which this version of swarmtune does not know")
    try:
        return kind(**fields)
    except TypeError as error:
        raise UsageError(f"{path} is incomplete: {error}") from error
