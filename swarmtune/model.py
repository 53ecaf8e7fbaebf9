"""The client's mirror of a Hugging Face model: stem, final norm and head are the library's own; the layers are one remote body."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel

from swarmtune.adapters.adapter import Adapter, Recipe, head_of, make_adapter, parse, saved_labels
from swarmtune.adapters.injection import HEAD_OF_TASK, weightless
from swarmtune.adapters.parts import HeadConfig
from swarmtune.adapters.tuners import check_over_quantised, kind_over_base
from swarmtune.errors import AdapterUnsupported, UsageError
from swarmtune.own_weights import compare_weights
from swarmtune.remote.body import RemoteBody, attached_to
from swarmtune.remote.guard import GradientGuard
from swarmtune.remote.layers import RemoteLayers, through_peft, without_positions
from swarmtune.skeleton import (
    Head,
    LayerSite,
    build_skeleton,
    check_identity,
    config_digest,
    find_layers,
    hidden_size,
    in_dtype,
    init_buffers,
    load_config,
)
from swarmtune.stored_model import StoredModel, fill
from swarmtune.weights import Checkpoint

if TYPE_CHECKING:
    from swarmtune.swarm import Swarm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
TASK_OF_HEAD = {head: task for task, head in HEAD_OF_TASK.items()}


def load_causal_lm(
    model: str | os.PathLike[str],
    swarm: Swarm,
    adapter: Any = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """Load the client's part of a causal language model; its body runs on ``swarm``.

    Args:
        model: a hub id or a local directory; only the shards with stem, final norm and head are opened.
        swarm: from ``connect``.
        adapter: a ``PeftConfig``, ``DeepPromptConfig``, ``StandInConfig`` or ``HeadConfig`` for something fresh, a saved adapter directory, or a
            list of these: one PEFT type and at most one of each other.
        dtype: of stem and head; by default what the servers compute in.
        device: for stem, head and adapter.

    Returns:
        The library's own ``...ForCausalLM``: Hugging Face call signature and output, no body parameters, and the attributes ``adapter`` (all
        that learns) and ``body`` (the low-level door). Everything but the adapter is frozen.

    Raises:
        UsageError: the model or the adapter cannot be used, with the reason.
        SwarmError: the swarm does not serve all blocks of this model, or serves another checkpoint than ``model`` (as far as it is on this disk).
    """
    return _load(model, swarm, adapter, "causal_lm", dtype, device)


def load_sequence_classifier(
    model: str | os.PathLike[str],
    swarm: Swarm,
    adapter: Any = None,
    *,
    num_labels: int | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """Load the client's part of a model that classifies whole texts; its head is here and learns.

    The head's weights are those of the checkpoint, or fresh ones as the library draws them where it has none. With a ``PeftConfig`` they are saved in
    PEFT's own format (``modules_to_save``), without one in swarmtune's.

    Args:
        model: as in ``load_causal_lm``; a causal language model's checkpoint is enough.
        swarm: from ``connect``.
        adapter: as in ``load_causal_lm``; without one only the head learns.
        num_labels: how many classes; the configuration's where not given.
        dtype: as in ``load_causal_lm``.
        device: as in ``load_causal_lm``.

    Returns:
        The library's own ``...ForSequenceClassification``, as ``load_causal_lm`` returns its model.

    Raises:
        UsageError: the model or the adapter cannot be used, with the reason.
        SwarmError: as in ``load_causal_lm``.
    """
    return _load(model, swarm, adapter, "sequence_classification", dtype, device, num_labels)


def load_token_classifier(
    model: str | os.PathLike[str],
    swarm: Swarm,
    adapter: Any = None,
    *,
    num_labels: int | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """Load the client's part of a model that classifies each token; see ``load_sequence_classifier``.

    Raises:
        UsageError: the model or the adapter cannot be used, with the reason.
        SwarmError: as in ``load_causal_lm``.
    """
    return _load(model, swarm, adapter, "token_classification", dtype, device, num_labels)


def _load(
    model: str | os.PathLike[str],
    swarm: Swarm,
    adapter: Any,
    head: Head,
    dtype: str | torch.dtype | None,
    device: str | torch.device,
    num_labels: int | None = None,
) -> PreTrainedModel:
    if not hasattr(swarm, "open_model"):
        raise UsageError(f"swarm must be a connection from swarmtune.connect, got {type(swarm).__name__}")
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("the meta device holds no values")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device must be one that is available here, got {device!r}: {str(error).splitlines()[0][:150]}") from error
    recipes = for_task(parse(adapter), head)
    name = os.fspath(model)
    config = load_config(name)
    digest, site = config_digest(config), check_identity(config)
    opened = swarm.open_model(digest, site.num_blocks)
    compare_weights(name, config, site, opened.directory)
    served = _dtype(opened.dtype)
    body = RemoteBody(swarm.loop, opened.chain, site.num_blocks, hidden_size(config))
    labels = num_labels if num_labels is not None or head == "causal_lm" else saved_labels(recipes)
    loaded, site = _load_ends(name, _with_labels(config, labels), site, head, _dtype(dtype) if dtype is not None else served)
    own = None
    if recipes:
        names = {id(module): module_name for module_name, module in loaded.named_modules()}
        own = make_adapter(recipes, weightless(loaded, served), site, name, body.initial, names.get(id(head_of(loaded)), ""))
        if own.spec is not None:
            check_over_quantised(kind_over_base(own.spec), opened.quantisation, opened.dtype)
    _attach(loaded, site, body, own)
    init_buffers(loaded, loaded)
    loaded.to(torch.device(device))  # type: ignore[arg-type]
    return loaded


def for_task(recipes: Sequence[Recipe], head: Head) -> list[Recipe]:
    """The parts for a model with this head; a classifier's head learns in any case.

    Raises:
        AdapterUnsupported: a part was made for another task, so another head belongs to it or none.
    """
    found, task = [], TASK_OF_HEAD[head]
    for config, saved in recipes:
        if isinstance(config, PeftConfig):
            config = copy.deepcopy(config)
            own = str(getattr(config.task_type, "value", config.task_type) or "CAUSAL_LM")
            if own != task and (saved is not None or head == "causal_lm"):
                what = f"the adapter in {saved} was trained for" if saved is not None else f"{type(config).__name__} is for"
                raise AdapterUnsupported(f"{what} {own}, and this model is for {task}: load the model that goes with it")
            config.task_type = task
        found.append((config, saved))
    if head != "causal_lm" and not any(isinstance(config, PeftConfig | HeadConfig) for config, _ in found):
        found.append((HeadConfig(), None))
    return found


def _with_labels(config: PretrainedConfig, num_labels: int | None) -> PretrainedConfig:
    if num_labels is not None:
        if type(num_labels) is not int or num_labels < 1:
            raise UsageError(f"num_labels must be a positive integer, got {num_labels!r}")
        config = copy.deepcopy(config)
        config.num_labels = num_labels
    return config


def _train_learning_parts(model: PreTrainedModel, mode: bool = True) -> PreTrainedModel:
    """``nn.Module.train`` for a model of which only the adapter learns: what PEFT put into stem and head follows, the rest stays in eval mode."""
    for module in model.children():
        module.train(mode and module is getattr(model, "adapter", None))
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.train(mode)
    adapter = getattr(model, "adapter", None)
    if adapter is not None and adapter.peft is not None and adapter.peft.wrapped is not None:
        adapter.peft.wrapped.prompt_encoder.train(mode)
    model.training = mode
    return model


def _refuse_to_save(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """A checkpoint without the body would load with random layers.

    Raises:
        UsageError: always.
    """
    raise UsageError("the body of this model is not here, so it cannot be saved: save what learns with model.adapter.save_pretrained(directory)")


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def _load_ends(name: str, config: PretrainedConfig, site: LayerSite, head: Head, dtype: torch.dtype) -> tuple[PreTrainedModel, LayerSite]:
    """The model with everything but its layers loaded, which stay on the meta device, and where it keeps them."""
    model = build_skeleton(in_dtype(config, dtype), head)
    own = replace(site, parent_name=find_layers(model).parent_name)
    tied, stored = _tied(model), StoredModel(model, Checkpoint(name))
    names = {key: key for key in model.state_dict() if key not in tied and own.split(key) is None}
    fresh = {key for key in names if head != "causal_lm" and _of_head(model, key) and stored.lacks([key]) is not None}
    fill(model, {key: key for key in names if key not in fresh}, stored, torch.device("cpu"))
    model.tie_weights()
    for module_name in sorted({key.rpartition(".")[0] for key in fresh}):
        module = model.get_submodule(module_name).to_empty(device="cpu").to(dtype)
        model._init_weights(module)
    return model.requires_grad_(False), own


def _of_head(model: PreTrainedModel, key: str) -> bool:
    """Whether a tensor lies behind the body, where a checkpoint of another task has nothing."""
    return key.partition(".")[0] != model.base_model_prefix


def _tied(model: PreTrainedModel) -> set[str]:
    """Names whose value is another parameter's, as the library says."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return set()
    keys = model._tied_weights_keys or {}
    return set(keys)


def _attach(model: PreTrainedModel, site: LayerSite, body: RemoteBody, adapter: Adapter | None) -> None:
    parent = model.get_submodule(site.parent_name)
    layers = RemoteLayers(body, adapter, site)
    setattr(parent, site.attribute, nn.ModuleList([layers]))
    parent.register_forward_pre_hook(layers.watch, with_kwargs=True)
    parent.register_forward_hook(layers.unprompt)
    # The frozen model computes as in eval mode, whatever mode a trainer sets: its blocks on the servers do so too.
    model.train = MethodType(_train_learning_parts, model)  # type: ignore[method-assign]
    model.save_pretrained = MethodType(_refuse_to_save, model)  # type: ignore[method-assign]
    model.push_to_hub = MethodType(_refuse_to_save, model)  # type: ignore[method-assign, assignment]
    model.body = body
    model.adapter = adapter  # type: ignore[assignment]
    if adapter is not None:
        if adapter.peft is not None and adapter.peft.wrapped is not None:
            model.forward = through_peft(model.forward, adapter.peft.wrapped)  # type: ignore[method-assign]
            if isinstance(model, GenerationMixin):
                model.prepare_inputs_for_generation = without_positions(model.prepare_inputs_for_generation)  # type: ignore[method-assign, misc]
        if (rule := adapter.regularise()) is not None:
            # PEFT adds it to a validation's loss too, which would then be no loss over tokens any more.
            model.register_forward_hook(lambda module, args, output: rule(output) if module.training else output)
    body.guard = guard = GradientGuard(lambda: [parameter for parameter in model.parameters() if parameter.requires_grad])
    model.register_forward_hook(lambda module, args, output: None if body.staged.output_BTH is not None else guard.watch(module, args, output))
    body.attached = attached_to(model)
    model.eval()
    model.config.use_cache = False
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.use_cache = False
