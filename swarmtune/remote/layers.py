"""The module that stands in the library's loop for all layers, and what must happen around it for virtual tokens."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from swarmtune.errors import UsageError
from swarmtune.probe import as_output
from swarmtune.remote.body import RemoteBody
from swarmtune.remote.randomness import random_state
from swarmtune.skeleton import LayerSite
from swarmtune.types import Kwarg

if TYPE_CHECKING:
    from swarmtune.adapters.adapter import Adapter

_SERVED = frozenset(
    ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "past_key_values", "use_cache", "cache_position",
     "return_dict", "output_hidden_states", "output_attentions", "output_router_logits", "num_items_in_batch", "is_first_iteration")
)  # fmt: skip
"""What the library's own loop may be called with: it travels, or it only concerns the stem and the outputs."""
_REFUSED = ("output_hidden_states", "output_attentions", "output_router_logits")
PREFIX_NAMES = ("prefix.key", "prefix.value")


class RemoteLayers(nn.Module):
    """Takes the place of all layers in the library's loop."""

    def __init__(self, body: RemoteBody, adapter: Adapter | None, site: LayerSite) -> None:
        super().__init__()
        vars(self).update(site.marks[0])
        # Not registered here: the model itself owns body and adapter under their public names.
        self._parts = (body, adapter)
        self._output_items = site.output_items
        self.given = threading.local()

    def forward(self, hidden_BTH: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        """Run the remote body with the mask and positions that the model was called with, not with what the library derived from them."""
        body, adapter = self._parts
        if body.staged.output_BTH is not None:
            body.staged.random = random_state(body.staged.output_BTH.device)
            return as_output(body.staged.output_BTH, self._output_items)
        mask, positions, prefix = getattr(self.given, "arguments", (None, None, ()))
        if adapter is None:
            output_BTH = body(hidden_BTH, mask, positions, kwargs=prefix)
        else:
            if adapter.training:
                adapter.check_trains()
            seed = int(torch.randint(1 << 62, ())) if adapter.needs_seed else None
            output_BTH = body(
                hidden_BTH, mask, positions, kwargs=[*adapter.kwargs(), *prefix], adapter=adapter.spec, seed=seed, whole=adapter.mixes_rows
            )
        return as_output(output_BTH, self._output_items)

    def watch(self, parent: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the library's forward: keep what must travel, refuse what would come back wrong, prepend virtual positions.

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
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise UsageError("attention_mask must be a (batch, sequence) tensor of ones and zeros")
        prefix = self._prefix(kwargs)
        adapter = self._parts[1]
        if adapter is not None and adapter.prompt_tokens:
            prepend(parent, kwargs, adapter.prompt_tokens)
            mask = kwargs.get("attention_mask")
        elif prefix and mask is not None:
            mask = mask[:, prefix[0].tensor.shape[1] :].to(torch.int64)
        self.given.arguments = (mask, kwargs.get("position_ids"), prefix)
        return (), kwargs

    def unprompt(self, parent: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the library's forward, which may reshape to the length that it began with: take the virtual positions away again."""
        tokens = self._parts[1].prompt_tokens if self._parts[1] is not None else 0
        if not tokens:
            return output
        if isinstance(output, tuple):
            return (output[0][:, tokens:], *output[1:])
        output["last_hidden_state"] = output["last_hidden_state"][:, tokens:]
        return output

    def _prefix(self, kwargs: dict[str, Any]) -> tuple[Kwarg, ...]:
        """Keys and values that PEFT put into the cache, as kwargs of their blocks.

        Raises:
            UsageError: a cache of another origin.
        """
        cache, adapter = kwargs.get("past_key_values"), self._parts[1]
        layers = cache.layers if cache is not None and cache.get_seq_length() > 0 else []
        trained = adapter is not None and adapter.peft is not None and adapter.peft.is_cache_prefix
        if kwargs.get("use_cache") or (layers and not trained):
            raise UsageError("a key-value cache is not served by remote blocks yet: call the model with use_cache=False")
        if not trained:
            return ()
        if len(layers) != self._parts[0].num_blocks:
            raise UsageError("the keys and values of this adapter did not reach the blocks: call the model itself, not a part of it")
        pairs = [(layer.keys.squeeze(0), layer.values.squeeze(0)) for layer in layers]
        return tuple(Kwarg(name, tensor, blocks=block) for block, pair in enumerate(pairs) for name, tensor in zip(PREFIX_NAMES, pair, strict=True))


def prepend(parent: nn.Module, kwargs: dict[str, Any], tokens: int) -> None:
    """Put ``tokens`` virtual positions of zeros, with mask 1, to the left of everything in a call of the library's ``parent``.

    Raises:
        UsageError: an argument that cannot be shifted along.
    """
    ids, embeds = kwargs.pop("input_ids", None), kwargs.get("inputs_embeds")
    if embeds is None:
        embeds = parent.get_input_embeddings()(ids)  # type: ignore[operator]
    if kwargs.get("token_type_ids") is not None:
        raise UsageError("token_type_ids cannot be used with deep prompts: call the model without it")
    batch = embeds.shape[0]
    kwargs["inputs_embeds"] = torch.cat([embeds.new_zeros(batch, tokens, embeds.shape[2]), embeds], dim=1)
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None:
        kwargs["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], tokens), mask], dim=1)
    if positions is not None:
        if mask is None and bool((positions[:, 1:] <= positions[:, :-1]).any()):
            raise UsageError("packed sequences cannot be used with deep prompts, which only the first one would see: pad instead")
        own = torch.arange(tokens, device=positions.device, dtype=positions.dtype).expand(positions.shape[0], tokens)
        kwargs["position_ids"] = torch.cat([own, positions + tokens], dim=1)


def through_peft(forward: Callable[..., Any], wrapped: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward that lets PEFT prepare virtual tokens first.

    Args:
        forward: the model's own.
        wrapped: the ``PeftModel`` around the model, which calls the model again.
    """
    inside = threading.local()
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def prepared(*args: Any, **kwargs: Any) -> Any:
        if getattr(inside, "now", False):
            return forward(*args, **kwargs)
        given = {**signature.bind_partial(*args).arguments, **kwargs}
        if given.get("position_ids") is not None:
            raise UsageError(
                "position_ids (packed sequences) cannot be used with virtual tokens, which PEFT puts before the first of them: pad instead"
            )
        given = {name: value for name, value in given.items() if name not in ("position_ids", "past_key_values", "use_cache", "cache_position")}
        inside.now = True
        try:
            return wrapped(**given)
        finally:
            inside.now = False

    return prepared


def without_positions(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """A model's preparation of a call within ``generate``, for one under PEFT's virtual tokens, which leave positions to the library.

    Args:
        prepare: the model's own.
    """

    @functools.wraps(prepare)
    def prepared(*args: Any, **kwargs: Any) -> Any:
        return {name: value for name, value in prepare(*args, **kwargs).items() if name != "position_ids"}

    return prepared
