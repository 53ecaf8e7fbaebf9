"""The client's adapter: all that learns, as leaf parameters under PEFT's names; saved whole or not at all."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from swarmtune.adapters.injection import HEAD_OF_TASK, weightless
from swarmtune.adapters.parts import (
    OWN_CONFIGS,
    DeepPromptConfig,
    DeepPrompts,
    Head,
    HeadConfig,
    Initial,
    OwnConfig,
    OwnPart,
    StandInConfig,
    StandIns,
    read_own_config,
)
from swarmtune.adapters.peft_part import CONFIG_FILE, WEIGHTS_FILE, PeftPart, read_config
from swarmtune.adapters.tuners import check_supported
from swarmtune.errors import AdapterUnsupported, UsageError
from swarmtune.skeleton import LayerSite, build_skeleton, find_layers
from swarmtune.types import Kwarg
from swarmtune.wire.messages import AdapterSpec

Recipe = tuple[PeftConfig | OwnConfig, Path | None]
"""A part to make, and the directory whose values it takes."""


class _Node(nn.Module):
    """One segment of a dotted parameter name. As a model under PEFT's training rules, it returns the output that it is given."""

    def forward(self, output: Any) -> Any:
        """Nothing is computed here."""
        return output


class Adapter(nn.Module):
    """All that learns, without the model around it.

    ``named_parameters()`` gives the names of a local ``PeftModel``'s trainable parameters, in the same order; a fresh adapter has the values that
    a fresh local one has under the same seed.

    Attributes:
        peft: the part that PEFT defines, or ``None``.
        own: the parts in swarmtune's own formats.
    """

    def __init__(self, peft: PeftPart | None, own: Sequence[OwnPart]) -> None:
        super().__init__()
        self.peft, self.own = peft, tuple(own)
        self._frozen = _Node()
        if peft is not None:
            for name, parameter in peft.parameters.items():
                _register(self, name, parameter)
            for name, tensor in peft.frozen.items():
                _register(self._frozen, name, tensor)
            root = self._modules.get("base_model")
            peft.attach(root._modules["model"] if root is not None and "model" in root._modules else _Node())  # type: ignore[arg-type]
        for part in self.own:
            for name, parameter in part.parameters.items():
                _register(self, name, parameter)

    @property
    def config(self) -> PeftConfig | None:
        """The ``PeftConfig``, or ``None``."""
        return self.peft.config if self.peft is not None else None

    @property
    def spec(self) -> AdapterSpec | None:
        """What travels of a PEFT configuration; ``None`` where nothing does."""
        return self.peft.spec if self.peft is not None else None

    @property
    def title(self) -> str:
        """Its parts, for people."""
        parts = [self.peft.kind] if self.peft is not None else []
        return " and ".join([*parts, *(part.config.FILE.replace("_", " ") for part in self.own)])

    @property
    def prompt_tokens(self) -> int:
        """Virtual positions of deep prompts."""
        return sum(part.num_tokens for part in self.own if isinstance(part, DeepPrompts))

    @property
    def mixes_rows(self) -> bool:
        """Whether a batch must not be cut into micro-batches."""
        return self.peft is not None and self.peft.mixes_rows

    @property
    def needs_seed(self) -> bool:
        """Whether a call must carry a seed for dropout inside the blocks."""
        return self.training and self.peft is not None and self.peft.dropout > 0

    def kwargs(self) -> list[Kwarg]:
        """All that travels: one kwarg per tensor, for its blocks.

        Raises:
            UsageError: a parameter is not the one that the model uses any more.
        """
        tensors: dict[str, Tensor] = dict(self.named_parameters())
        self._check_attached()
        found = self.peft.kwargs({**dict(self._frozen.named_buffers()), **tensors}) if self.peft is not None else []
        return found + [kwarg for part in self.own for kwarg in part.kwargs(tensors)]

    def _check_attached(self) -> None:
        """Parameters that act on the client stand in the model too: replaced in one place only, they would learn or be saved without effect."""
        own = dict(self.named_parameters())
        parts = [self.peft.parameters] if self.peft is not None else []
        for given in [*parts, *(part.parameters for part in self.own)]:
            for name, parameter in given.items():
                if own.get(name) is not parameter:
                    raise UsageError(
                        f"{name} was replaced and is not what the model uses any more: copy values into it (load_state_dict without assign=True)"
                    )
        for part in self.own:
            part.check_attached()

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write a PEFT directory, whole or not at all, and check it by letting PEFT load it again; other parts have files of their own beside it.

        Raises:
            UsageError: the directory cannot be written, or PEFT would not load the same adapter from it.
        """
        self._check_attached()
        target = Path(directory).absolute()
        temporary = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
            values = {name: parameter.detach().to("cpu") for name, parameter in self.named_parameters()}
            if self.peft is not None:
                self.peft.write(temporary, {name: values[name] for name in self.peft.parameters})
            for part in self.own:
                part.write(temporary, values)
            for file in temporary.glob("*.safetensors"):
                file.chmod(0o644)
            os.chmod(temporary, 0o755)
            _replace(temporary, target)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"the adapter cannot be written to {target}: {reason}") from error
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)

    def load_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Take the values of a saved adapter of the same parts and shapes; nothing changes unless all of them fit.

        Raises:
            UsageError: a tensor is missing, superfluous or of another shape, or the directory cannot be read.
        """
        path = Path(directory).expanduser()
        there = {"PEFT" if isinstance(config, PeftConfig) else config.FILE for config, _ in _saved(path)}
        here = {*(["PEFT"] if self.peft is not None else []), *(part.config.FILE for part in self.own)}
        if extra := sorted(there - here):
            raise UsageError(f"the adapter in {path} does not fit: it has a part ({extra[0].replace('_', ' ')}) that this adapter does not have")
        values: dict[str, Tensor] = {}
        if self.peft is not None:
            values |= self.peft.read(path)
        for part in self.own:
            values |= part.read(path)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(values[name])

    def check_trains(self) -> None:
        """Refuse what can be used and not trained.

        Raises:
            AdapterUnsupported: with the reason.
        """
        if self.peft is not None:
            self.peft.check_trains()

    def after_step(self, step: int) -> None:
        """The tuner's own rule for the end of optimizer step ``step`` (from 0), while gradients are there."""
        if self.peft is not None:
            self.peft.after_step(step)

    def regularise(self) -> Callable[[Any], Any] | None:
        """What the tuner adds to an output's loss; ``None`` where it adds nothing."""
        return self.peft.regularise() if self.peft is not None else None

    def rule_state(self) -> dict[str, Any]:
        """What the tuner's rule remembers, for a checkpoint."""
        return self.peft.rule_state() if self.peft is not None else {}

    def load_rule_state(self, state: Mapping[str, Any]) -> None:
        """Go on from ``rule_state``."""
        if self.peft is not None:
            self.peft.load_rule_state(state)


def make_adapter(
    recipes: Sequence[Recipe], model: PreTrainedModel, site: LayerSite, model_name: str, initial: Initial | None = None, head: str | None = None
) -> Adapter:
    """Build an adapter over the client's model, whose blocks may be weightless.

    Args:
        recipes: from ``parse``.
        model: PEFT puts its layers into it.
        site: where it keeps its blocks.
        model_name: for exported configurations.
        initial: asks the servers for values that depend on body weights.
        head: name of the module that is the model's head.

    Raises:
        AdapterUnsupported: a type, a setting, a target or a mix.
        UsageError: what is saved does not fit.
    """
    peft, own = None, []
    for config, saved in recipes:
        if isinstance(config, PeftConfig):
            peft = PeftPart(model, site, config, model_name, initial, saved)
            continue
        if isinstance(config, DeepPromptConfig):
            part: OwnPart = DeepPrompts(config, model.config, site)
        elif isinstance(config, StandInConfig):
            part = StandIns(config, model.config, site, initial)
            _check_stood_in(part, model)
        else:
            part = Head(config, model, model.get_submodule(head) if head else None, head or "")
        if saved is not None:
            stored = part.read(saved)
            with torch.no_grad():
                for name, parameter in part.parameters.items():
                    parameter.copy_(stored[name])
        if isinstance(part, Head):
            part.attach()
        own.append(part)
    return Adapter(peft, own)


def parse(adapter: object) -> list[Recipe]:
    """What ``adapter=`` asks for: one configuration or saved directory, or a list of these.

    Raises:
        AdapterUnsupported: anything else, or a mix that is not served.
        UsageError: a directory that holds no adapter.
    """
    if adapter is None:
        return []
    items = list(adapter) if isinstance(adapter, list | tuple) else [adapter]
    recipes: list[Recipe] = []
    for item in items:
        if isinstance(item, PeftConfig | OwnConfig):
            recipes.append((item, None))
        elif isinstance(item, str | os.PathLike):
            recipes.extend(_saved(Path(item).expanduser()))
        else:
            raise AdapterUnsupported(f"adapter must be a PeftConfig, a config of swarmtune's or a saved adapter directory, got {type(item).__name__}")
    kinds = ["a PEFT type" if isinstance(config, PeftConfig) else type(config).__name__ for config, _ in recipes]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise AdapterUnsupported(f"an adapter holds at most one of {kind}, got {kinds.count(kind)}")
    # One order, however they were listed: optimizers know parameters by their number.
    recipes.sort(key=lambda recipe: -1 if isinstance(recipe[0], PeftConfig) else OWN_CONFIGS.index(type(recipe[0])))
    _check_mix(recipes)
    return recipes


def check(adapter: object) -> None:
    """Check what can be checked of ``adapter=`` without a model.

    Raises:
        UsageError: what ``parse`` raises, and types and settings that are not supported.
    """
    for config, _ in parse(adapter):
        if isinstance(config, PeftConfig):
            check_supported(config)


def _check_mix(recipes: Sequence[Recipe]) -> None:
    """Refuse what would act twice on one thing."""
    own = {type(config) for config, _ in recipes}
    for config, _ in recipes:
        if isinstance(config, PeftConfig):
            if config.is_prompt_learning and DeepPromptConfig in own:
                raise AdapterUnsupported(f"{type(config).__name__} and deep prompts both add virtual tokens: use one of them")
            if HeadConfig in own and set(getattr(config, "modules_to_save", None) or ()) & {"lm_head", "embed_out", "score", "classifier"}:
                raise AdapterUnsupported("modules_to_save and HeadConfig both train the head: use one of them")
            if StandInConfig in own and getattr(config, "bias", "none") != "none":
                raise AdapterUnsupported(
                    f"bias={getattr(config, 'bias', None)!r} and StandInConfig both train parameters of the blocks: use one of them"
                )


def _check_stood_in(part: StandIns, model: PreTrainedModel) -> None:
    """Refuse stand-ins for what PEFT has put a trained copy in the place of: nothing would use them."""
    for name in part.parameters:
        owner, _, leaf = name.removeprefix("param.").rpartition(".")
        if isinstance(model.get_submodule(owner), AuxiliaryTrainingWrapper | LNTuningLayer):
            raise AdapterUnsupported(f"the PEFT configuration and StandInConfig both train {owner}.{leaf}: use one of them")


def _saved(path: Path) -> list[Recipe]:
    """The parts that a directory holds.

    Raises:
        UsageError: none.
    """
    found: list[Recipe] = []
    if (path / CONFIG_FILE).is_file():
        found.append((read_config(path), path))
    for kind in OWN_CONFIGS:
        if (config := read_own_config(path, kind)) is not None:
            found.append((config, path))
    if not found:
        raise UsageError(f"{path} is not an adapter directory: it has no {CONFIG_FILE}, and nothing of swarmtune's own")
    return found


def offline_adapter(model_config: PretrainedConfig, adapter: object, model_name: str) -> Adapter:
    """An adapter without a swarm and without weights: to count, load, check or export it. Fresh values that need body weights are not right.

    Raises:
        UsageError: the adapter cannot be used, with the reason.
    """
    recipes = parse(adapter)
    labels = saved_labels(recipes)
    if labels is not None:
        model_config = copy.deepcopy(model_config)
        model_config.num_labels = labels
    tasks = [str(getattr(config.task_type, "value", config.task_type)) for config, _ in recipes if isinstance(config, PeftConfig)]
    kind = "sequence_classification" if labels is not None and not tasks else HEAD_OF_TASK.get(tasks[0] if tasks else "", "causal_lm")
    model = weightless(build_skeleton(model_config, kind))
    names = {id(module): name for name, module in model.named_modules()}
    return make_adapter(recipes, model, find_layers(model), model_name, head=names.get(id(head_of(model)), ""))


def head_of(model: PreTrainedModel) -> nn.Module | None:
    """The module behind the body that gives logits."""
    output = model.get_output_embeddings()
    if output is not None:
        return output
    return next((module for name, module in model.named_children() if name in ("score", "classifier") and isinstance(module, nn.Linear)), None)


def saved_labels(recipes: Sequence[Recipe]) -> int | None:
    """How many classes the saved head of a classifier has; ``None`` where none is saved."""
    for config, saved in recipes:
        file = None if saved is None else saved / (WEIGHTS_FILE if isinstance(config, PeftConfig) else f"{config.FILE}.safetensors")
        if file is not None and file.is_file():
            try:
                with safe_open(file, "pt") as stored:
                    for name in stored.keys():  # noqa: SIM118  # it is no mapping
                        if name.endswith(("score.weight", "classifier.weight")):
                            return int(stored.get_slice(name).get_shape()[0])
            except (SafetensorError, OSError) as error:
                raise UsageError(f"{file} is not a whole safetensors file: {error}") from error
    return None


def _register(owner: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor under a dotted name: a parameter as it is, anything else as a buffer."""
    *path, leaf = name.split(".")
    node = owner
    for segment in path:
        child = node._modules.get(segment)
        if child is None:
            child = _Node()
            node.add_module(segment, child)
        node = child
    if isinstance(value, nn.Parameter):
        node.register_parameter(leaf, value)
    else:
        node.register_buffer(leaf, value, persistent=False)


def _replace(source: Path, target: Path) -> None:
    """Move ``source`` to ``target``; a former directory there disappears only once the new one is whole."""
    if not target.exists():
        source.rename(target)
        return
    ours = (CONFIG_FILE, *(f"{kind.FILE}_config.json" for kind in OWN_CONFIGS))
    if not target.is_dir() or (not any((target / name).is_file() for name in ours) and any(target.iterdir())):
        raise UsageError(f"{target} exists and is not an adapter directory: choose another one")
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    target.rename(old / "adapter")
    source.rename(target)
    shutil.rmtree(old, ignore_errors=True)
