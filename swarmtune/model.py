"""The client's mirror of a Hugging Face model: stem, final norm and head are the library's own; the layers are one remote body."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from swarmtune.adapters.adapter import PeftAdapter, load_adapter
from swarmtune.adapters.tuners import check_over_quantised
from swarmtune.errors import AdapterUnsupported, UsageError
from swarmtune.own_weights import compare_weights
from swarmtune.probe import as_output
from swarmtune.remote.body import RemoteBody
from swarmtune.skeleton import LayerSite, build_skeleton, check_identity, config_digest, hidden_size, in_dtype, init_buffers, load_config
from swarmtune.stored_model import StoredModel, fill
from swarmtune.weights import Checkpoint

if TYPE_CHECKING:
    from swarmtune.swarm import Swarm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_SERVED = frozenset(
    ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "past_key_values", "use_cache", "cache_position",
     "return_dict", "output_hidden_states", "output_attentions", "output_router_logits", "num_items_in_batch", "is_first_iteration")
)  # fmt: skip
"""What the library's own loop may be called with: it travels, or it only concerns the stem and the outputs."""
_REFUSED = ("output_hidden_states", "output_attentions", "output_router_logits")


class RemoteLayers(nn.Module):
    """Takes the place of all layers in the library's loop."""

    def __init__(self, body: RemoteBody, adapter: PeftAdapter | None, site: LayerSite) -> None:
        super().__init__()
        vars(self).update(site.marks[0])
        # Not registered here: the model itself owns body and adapter under their public names.
        self._parts = (body, adapter)
        self._output_items = site.output_items
        self.given = threading.local()

    def forward(self, hidden_BTH: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        """Run the remote body with the mask and positions that the model was called with, not with what the library derived from them."""
        body, adapter = self._parts
        mask, positions = getattr(self.given, "arguments", (None, None))
        output_BTH = body(hidden_BTH, mask, positions, kwargs=adapter.kwargs() if adapter else (), adapter=adapter.spec if adapter else None)
        return as_output(output_BTH, self._output_items)

    def watch(self, parent: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the library's forward: keep what must travel, refuse what would come back wrong.

        Raises:
            UsageError: outputs or caches that the remote body does not serve.
        """
        config = getattr(parent, "config", None)
        kwargs = {**inspect.signature(parent.forward).bind_partial(*args).arguments, **kwargs}
        for name in _REFUSED:
            if kwargs.get(name) or (kwargs.get(name) is None and getattr(config, name, False)):
                raise UsageError(f"{name} is not served by remote blocks: call the model without it")
        for name, value in kwargs.items():
            if value is not None and name not in _SERVED:
                raise UsageError(f"the argument {name} does not reach remote blocks: call the model without it")
        cache = kwargs.get("past_key_values")
        if kwargs.get("use_cache") or (cache is not None and cache.get_seq_length() > 0):
            raise UsageError("a key-value cache is not served by remote blocks yet: call the model with use_cache=False")
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise UsageError("attention_mask must be a (batch, sequence) tensor of ones and zeros")
        self.given.arguments = (mask, kwargs.get("position_ids"))


def load_causal_lm(
    model: str | os.PathLike[str],
    swarm: Swarm,
    adapter: PeftConfig | str | os.PathLike[str] | Sequence[Any] | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """Load the client's part of a causal language model; its body runs on ``swarm``.

    Args:
        model: a hub id or a local directory; only the shards with stem, final norm and head are opened.
        swarm: from ``connect``.
        adapter: a ``PeftConfig`` for a fresh adapter, or a PEFT directory to load.
        dtype: of stem and head; by default what the servers compute in.
        device: for stem, head and adapter.

    Returns:
        The library's own ``...ForCausalLM``: Hugging Face call signature and output, no body parameters, and the attributes ``adapter`` (all
        that learns) and ``body`` (the low-level door). Everything but the adapter is frozen.

    Raises:
        UsageError: the model or the adapter cannot be used, with the reason.
        SwarmError: the swarm does not serve all blocks of this model, or serves another checkpoint than ``model`` (as far as it is on this disk).
    """
    if not hasattr(swarm, "open_model"):
        raise UsageError(f"swarm must be a connection from swarmtune.connect, got {type(swarm).__name__}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device must be one that is available here, got {device!r}: {str(error).splitlines()[0][:150]}") from error
    name = os.fspath(model)
    config = load_config(name)
    site = check_identity(config)
    own = _make_adapter(adapter, config, name)
    opened = swarm.open_model(config_digest(config), site.num_blocks)
    if own is not None:
        check_over_quantised(own.spec.config["peft_type"], opened.quantisation, opened.dtype)
    compare_weights(name, config, site, opened.directory)
    element_type = _dtype(dtype if dtype is not None else opened.dtype)
    body = RemoteBody(swarm.loop, opened.chain, site.num_blocks, hidden_size(config))
    loaded = _load_ends(name, config, site, element_type, torch.device(device))
    _attach(loaded, site, body, own)
    loaded.to(torch.device(device))  # type: ignore[arg-type]
    return loaded


def _train_adapter_only(model: PreTrainedModel, mode: bool = True) -> PreTrainedModel:
    """``nn.Module.train`` for a model whose only learning part is its adapter."""
    for module in model.children():
        module.train(mode and module is getattr(model, "adapter", None))
    model.training = mode
    return model


def _refuse_to_save(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """A checkpoint without the body would load with random layers.

    Raises:
        UsageError: always.
    """
    raise UsageError("the body of this model is not here, so it cannot be saved: save what learns with model.adapter.save_pretrained(directory)")


def _make_adapter(adapter: object, config: PretrainedConfig, name: str) -> PeftAdapter | None:
    if adapter is None:
        return None
    if isinstance(adapter, list | tuple):
        if len(adapter) != 1:
            raise AdapterUnsupported(f"a list of {len(adapter)} adapters is not supported: give one PEFT configuration or directory")
        return _make_adapter(adapter[0], config, name)
    if isinstance(adapter, PeftConfig):
        return PeftAdapter(config, adapter, name)
    if isinstance(adapter, str | os.PathLike):
        return load_adapter(config, adapter, name)
    raise AdapterUnsupported(f"adapter must be a PeftConfig or a saved adapter directory, got {type(adapter).__name__}")


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def _load_ends(name: str, config: PretrainedConfig, site: LayerSite, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model with everything but its layers loaded."""
    model = build_skeleton(in_dtype(config, dtype))
    stored = StoredModel(model, Checkpoint(name))
    setattr(model.get_submodule(site.parent_name), site.attribute, nn.ModuleList())
    tied = _tied(model)
    names = {key: key for key in model.state_dict() if key not in tied}
    fill(model, names, stored, device)
    model.tie_weights()
    init_buffers(model, model, device)
    return model.requires_grad_(False)


def _tied(model: PreTrainedModel) -> set[str]:
    """Names whose value is another parameter's, as the library says."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return set()
    keys = model._tied_weights_keys or {}
    return set(keys)


def _attach(model: PreTrainedModel, site: LayerSite, body: RemoteBody, adapter: PeftAdapter | None) -> None:
    parent = model.get_submodule(site.parent_name)
    layers = RemoteLayers(body, adapter, site)
    setattr(parent, site.attribute, nn.ModuleList([layers]))
    parent.register_forward_pre_hook(layers.watch, with_kwargs=True)
    # The frozen model computes as in eval mode, whatever mode a trainer sets: its blocks on the servers do so too.
    model.train = MethodType(_train_adapter_only, model)  # type: ignore[method-assign]
    model.save_pretrained = MethodType(_refuse_to_save, model)  # type: ignore[method-assign]
    model.push_to_hub = MethodType(_refuse_to_save, model)  # type: ignore[method-assign, assignment]
    model.eval()
    model.body = body
    model.adapter = adapter  # type: ignore[assignment]
    model.config.use_cache = False
    if model.generation_config is not None:
        model.generation_config.use_cache = False
