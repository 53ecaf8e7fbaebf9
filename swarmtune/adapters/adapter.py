"""The client's adapter: leaf parameters under PEFT's names, for any supported tuner; saved and loaded as a PEFT directory."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from swarmtune.adapters.tuners import ADAPTER_NAME, PEFT_PREFIX, check_supported, inject, resolve, wire_name
from swarmtune.errors import AdapterUnsupported, UsageError
from swarmtune.skeleton import build_skeleton, find_layers
from swarmtune.types import Kwarg
from swarmtune.wire.messages import AdapterSpec

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


class _Node(nn.Module):
    """One segment of a dotted parameter name."""


class PeftAdapter(nn.Module):
    """All that a PEFT tuner learns, without the model around it.

    ``named_parameters()`` gives the names of a local ``PeftModel``'s trainable parameters, in the same order; a fresh adapter has the values that
    a fresh local one has under the same seed.

    Attributes:
        config: the ``PeftConfig``.
        spec: what travels to the servers.
    """

    def __init__(self, model_config: PretrainedConfig, config: PeftConfig, model_name: str) -> None:
        """Build and initialise the parameters.

        Raises:
            AdapterUnsupported: the tuner, one of its settings or its targets.
        """
        super().__init__()
        check_supported(config)
        self.config = copy.deepcopy(config)
        self.config.base_model_name_or_path = model_name
        self.config.inference_mode = False  # what is given here is trained
        self.config.task_type = self.config.task_type or "CAUSAL_LM"
        self._model_config = model_config
        injected = inject(_weightless(build_skeleton(model_config)), self.config)
        self.spec: AdapterSpec = resolve(injected, self.config)
        self._site = find_layers(cast(PreTrainedModel, injected.get_base_model()))
        for name, parameter in injected.named_parameters():
            if parameter.requires_grad:
                self._register(name, parameter.detach().clone())

    def kwargs(self) -> list[Kwarg]:
        """One kwarg per parameter, for its block."""
        found = []
        for name, parameter in self.named_parameters():
            place = self._site.split(name.removeprefix(PEFT_PREFIX))
            assert place is not None, f"{name} lies outside the blocks"
            block, within = place
            found.append(Kwarg(f"peft.{self.spec.digest}.{wire_name(within)}", parameter, blocks=block))
        return found

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write a PEFT directory, whole or not at all, and check it by letting PEFT load it again.

        Raises:
            UsageError: the directory cannot be written, or PEFT would not load the same adapter from it.
        """
        target = Path(directory).absolute()
        temporary = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
            self._write(temporary)
            self._check(temporary)
            os.chmod(temporary, 0o755)
            _replace(temporary, target)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"the adapter cannot be written to {target}: {reason}") from error
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)

    def load_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Take the values of a PEFT directory of the same tuner and shapes; nothing changes unless all of them fit.

        Raises:
            UsageError: a tensor is missing, superfluous or of another shape, or the directory cannot be read.
        """
        stored = self._to_names(_read_weights(Path(directory)))
        own = dict(self.named_parameters())
        missing, extra = sorted(set(own) - set(stored)), sorted(set(stored) - set(own))
        if missing or extra:
            what = f"lacks {missing[0]}" if missing else f"holds {extra[0]}, which this adapter does not have"
            raise UsageError(f"the adapter in {directory} does not fit: it {what} (are its rank and target_modules the same?)")
        for name, parameter in own.items():
            if stored[name].shape != parameter.shape:
                raise UsageError(f"the adapter in {directory} does not fit: {name} is {tuple(stored[name].shape)}, expected {tuple(parameter.shape)}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(stored[name])

    def _register(self, name: str, value: Tensor) -> None:
        *path, leaf = name.split(".")
        node: nn.Module = self
        for segment in path:
            child = node._modules.get(segment)
            if child is None:
                child = _Node()
                node.add_module(segment, child)
            node = child
        node.register_parameter(leaf, nn.Parameter(value))

    def _tensors(self) -> dict[str, Tensor]:
        return {name: parameter.detach().to("cpu") for name, parameter in self.named_parameters()}

    def _fresh(self) -> PeftModel:
        return inject(_weightless(build_skeleton(self._model_config)), self.config)

    def _write(self, directory: Path) -> None:
        tensors = {name.removeprefix(PEFT_PREFIX): value for name, value in self._tensors().items()}
        named = {PEFT_PREFIX + name: value for name, value in tensors.items()}
        stored = get_peft_model_state_dict(self._fresh(), state_dict=named, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
        save_file({name: value.contiguous() for name, value in stored.items()}, directory / WEIGHTS_FILE, metadata={"format": "pt"})
        config = copy.deepcopy(self.config)
        config.inference_mode = True
        config.save_pretrained(str(directory))
        os.chmod(directory / WEIGHTS_FILE, (directory / CONFIG_FILE).stat().st_mode & 0o777)  # safetensors lets nobody else read its files

    def _check(self, directory: Path) -> None:
        """Load what was written into a fresh PEFT model and compare every value."""
        config = PeftConfig.from_pretrained(str(directory))
        config.inference_mode = False
        model = inject(_weightless(build_skeleton(self._model_config)), config)
        result: Any = set_peft_model_state_dict(model, load_file(directory / WEIGHTS_FILE), adapter_name=ADAPTER_NAME)
        loaded = {name: parameter for name, parameter in model.named_parameters() if f".{ADAPTER_NAME}" in name}
        own = self._tensors()
        wrong = [name for name in own if name not in loaded or not torch.equal(loaded[name].detach(), own[name])]
        if result.unexpected_keys or wrong or set(loaded) != set(own):
            first = (list(result.unexpected_keys) + wrong + sorted(set(loaded) ^ set(own)))[0]
            raise UsageError(f"the exported adapter would not load as it is ({first}): nothing was written")

    def _to_names(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """Translate keys of a PEFT file to parameter names, by PEFT's own rule applied to our names."""
        own = {name: torch.empty(0) for name, _ in self.named_parameters()}
        keys = {}
        model = self._fresh()
        for name in own:
            (key,) = get_peft_model_state_dict(model, state_dict={name: own[name]}, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
            keys[key] = name
        return {keys.get(key, key): value for key, value in stored.items()}


def load_adapter(model_config: PretrainedConfig, directory: str | os.PathLike[str], model_name: str) -> PeftAdapter:
    """The adapter that a PEFT directory holds.

    Raises:
        UsageError: there is no such directory, or it does not fit the model.
    """
    path = Path(directory).expanduser()
    if not (path / CONFIG_FILE).is_file():
        raise UsageError(f"{path} is not a PEFT adapter directory: it has no {CONFIG_FILE}")
    try:
        config = PeftConfig.from_pretrained(str(path))
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterUnsupported(f"{path / CONFIG_FILE} is not a PEFT configuration: {str(error)[:300]}") from error
    config.inference_mode = False
    adapter = PeftAdapter(model_config, config, model_name)
    adapter.load_pretrained(path)
    return adapter


def _read_weights(directory: Path) -> dict[str, Tensor]:
    path = directory.expanduser() / WEIGHTS_FILE
    if not path.is_file():
        raise UsageError(f"there is no {WEIGHTS_FILE} in {directory}: swarmtune reads safetensors only")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is not a whole safetensors file: {error}") from error


def _replace(source: Path, target: Path) -> None:
    """Move ``source`` to ``target``; a former directory there disappears only once the new one is whole."""
    if not target.exists():
        source.rename(target)
        return
    if not target.is_dir() or (not (target / CONFIG_FILE).is_file() and any(target.iterdir())):
        raise UsageError(f"{target} exists and is not an adapter directory: choose another one")
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    target.rename(old / "adapter")
    source.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _weightless(model: PreTrainedModel) -> PreTrainedModel:
    """Replace meta parameters by CPU tensors of the right shape over a single stored zero.

    PEFT initialises its layers on the device of their base layer; on the meta device the values would be lost.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            zero = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            module.register_parameter(name, nn.Parameter(zero, requires_grad=False))
    return model
