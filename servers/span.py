"""Door 9: hidden states and kwargs through frozen layers, forward and backward, in one piece.

A program is the library's own model cut to a span, with a tuner's layers injected where a call brings a tuner; its frozen tensors are shared with
all other programs, and the client's tensors take the place of its learnable ones for the length of one call.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PretrainedConfig, PreTrainedModel

from servers.weights import BlockWeights
from swarmtune.adapters.tuners import check_over_quantised, injected_skeleton, wire_name
from swarmtune.errors import KwargError, NonFinite
from swarmtune.skeleton import LayerSite, build_skeleton, call_span, hidden_size, in_dtype, init_buffers, truncate
from swarmtune.types import BlockSpan
from swarmtune.wire.messages import AdapterSpec, CallKwarg, SpanCall, SpanResult

MAX_PROGRAMS = 16
LIBRARY_ARGUMENTS = ("attention_mask", "position_ids")


@dataclass(frozen=True, slots=True)
class Program:
    """A runnable span.

    Attributes:
        parent: the module that loops over the layers.
        layers: its layers, one per block of the span.
        tuner: per block, the name as it travels to the name in ``parent``, for each tensor of the injected tuner.
        frozen: per block, the name within the block to the name in ``parent``, for each frozen parameter that is not quantised.
    """

    parent: nn.Module
    layers: nn.ModuleList
    tuner: Mapping[int, Mapping[str, str]]
    frozen: Mapping[int, Mapping[str, str]]


@dataclass(slots=True)
class Bound:
    """A call's tensors, sorted by what they do."""

    replacements: dict[str, Tensor]
    arguments: dict[str, Tensor]
    prompts: dict[int, Tensor]
    leaves: list[tuple[int, Tensor]]


class Span:
    """The blocks that one server holds. Not thread-safe: one device worker runs it."""

    def __init__(
        self, config: PretrainedConfig, site: LayerSite, span: BlockSpan, weights: BlockWeights, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config, self.site, self.span, self.weights = in_dtype(config, dtype), site, span, weights
        self.dtype, self.device = dtype, device
        self._programs: OrderedDict[tuple[BlockSpan, str], Program] = OrderedDict()

    def forward(self, call: SpanCall) -> SpanResult:
        """Run the called blocks and keep no graph.

        Where a backward will follow, each block is run with a graph, which ends with the block: torch picks other kernels with one than without (of
        attention with a learned mask, of convolutions), and a local model would be run with one.

        Raises:
            KwargError: the call does not fit these blocks.
            NonFinite: an output is not finite; says which block first.
        """
        program = self._program(call)
        bound = self._bind(program, call)
        with torch.set_grad_enabled(bool(bound.leaves)), _graph_per_block(program):
            output_BTH = self._run(program, bound, call.hidden_BTH.to(self.device, self.dtype)).detach()
            if not _finite(output_BTH, bound.arguments.get("attention_mask")):
                self._blame(program, bound, call)
        return SpanResult(output_BTH.to("cpu", call.hidden_BTH.dtype))

    def backward(self, call: SpanCall) -> SpanResult:
        """Run the called blocks again with a graph, and return the gradients that the call asks for.

        This is where a kept graph (an activation handle) will save the second forward; without one, the inputs in the call are enough.

        Raises:
            KwargError: the call does not fit these blocks.
        """
        assert call.grad_BTH is not None, "a backward has a gradient"
        program = self._program(call)
        bound = self._bind(program, call)
        hidden_BTH = call.hidden_BTH.to(self.device, self.dtype).detach().requires_grad_(call.input_grad)
        wanted = [leaf for _, leaf in bound.leaves] + ([hidden_BTH] if call.input_grad else [])
        if not wanted:
            return SpanResult(None)
        with torch.enable_grad():
            output_BTH = self._run(program, bound, hidden_BTH)
        if output_BTH.requires_grad:
            grads: tuple[Tensor | None, ...] = torch.autograd.grad(output_BTH, wanted, call.grad_BTH.to(self.device, self.dtype), allow_unused=True)
        else:
            grads = (None,) * len(wanted)
        filled = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(wanted, grads, strict=True)]
        input_grad = filled.pop().to("cpu", call.hidden_BTH.dtype) if call.input_grad else None
        return SpanResult(input_grad, _by_kwarg(call, bound, filled))

    def _program(self, call: SpanCall) -> Program:
        assert self.span.covers(call.span), "the handler has checked the span"
        if call.hidden_BTH.shape[-1] != hidden_size(self.config):
            raise KwargError(f"hidden states have width {call.hidden_BTH.shape[-1]}, this model's have {hidden_size(self.config)}")
        key = (call.span, call.adapter.digest if call.adapter else "")
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = self._build(call.span, call.adapter)
            while len(self._programs) > MAX_PROGRAMS:
                self._programs.popitem(last=False)
        self._programs.move_to_end(key)
        return program

    def _build(self, span: BlockSpan, adapter: AdapterSpec | None) -> Program:
        if adapter is not None:
            check_over_quantised(str(adapter.config.get("peft_type")), self.weights.quantisation, str(self.dtype).removeprefix("torch."))
            model: PreTrainedModel = injected_skeleton(self.config, adapter, lambda model: self.weights.prepare(model, self.site))
        else:
            self.weights.prepare(model := build_skeleton(self.config), self.site)
        parent = truncate(model, self.site, span.start, span.stop)
        layers = getattr(parent, self.site.attribute)
        tuner: dict[int, dict[str, str]] = {}
        frozen: dict[int, dict[str, str]] = {}
        for position, layer in enumerate(layers):
            block = span.start + position
            self.weights.lend(block, layer)
            tuner[block], frozen[block] = _share(layer, self.weights.blocks[block], f"{self.site.attribute}.{position}.")
        init_buffers(parent, model, self.device)
        return Program(parent.eval(), layers, tuner, frozen)

    def _bind(self, program: Program, call: SpanCall) -> Bound:
        """Sort the kwargs into parameters, library arguments and prompts; every tensor of the tuner must be there."""
        bound = Bound({}, {}, {}, [])
        for index, kwarg in enumerate(call.kwargs):
            if not call.span.covers(kwarg.blocks):
                raise KwargError(f"kwarg {kwarg.name} is for blocks {kwarg.blocks}, the call is for {call.span}")
            if kwarg.name in LIBRARY_ARGUMENTS:
                self._bind_argument(program, call, kwarg, bound)
                continue
            for block in range(kwarg.blocks.start, kwarg.blocks.stop):
                leaf = self._leaf(kwarg)
                self._bind_block(program, call, kwarg, block, leaf, bound)
                if kwarg.requires_grad:
                    bound.leaves.append((index, leaf))
        for names in program.tuner.values():
            missing = [name for name, full in names.items() if full not in bound.replacements]
            if missing:
                raise KwargError(f"the call brings an adapter configuration but not its tensor {missing[0]}")
        return bound

    def _leaf(self, kwarg: CallKwarg) -> Tensor:
        tensor = kwarg.tensor.to(self.device)
        return tensor.detach().requires_grad_() if kwarg.requires_grad else tensor

    def _bind_argument(self, program: Program, call: SpanCall, kwarg: CallKwarg, bound: Bound) -> None:
        if kwarg.name not in inspect.signature(program.parent.forward).parameters:
            raise KwargError(f"{type(program.parent).__name__} takes no {kwarg.name}")
        if kwarg.blocks != call.span or kwarg.requires_grad:
            raise KwargError(f"{kwarg.name} must be for all blocks, and has no gradient")
        if kwarg.tensor.dim() != 2 or kwarg.tensor.shape[1] != call.hidden_BTH.shape[1] or kwarg.tensor.shape[0] not in (1, call.hidden_BTH.shape[0]):
            raise KwargError(f"{kwarg.name} must have shape (batch, sequence) = {tuple(call.hidden_BTH.shape[:2])}, got {tuple(kwarg.tensor.shape)}")
        if kwarg.name in bound.arguments:
            raise KwargError(f"{kwarg.name} is given twice")
        bound.arguments[kwarg.name] = kwarg.tensor.to(self.device)

    def _bind_block(self, program: Program, call: SpanCall, kwarg: CallKwarg, block: int, leaf: Tensor, bound: Bound) -> None:
        if kwarg.name == "prompt":
            _check_prompt(call, kwarg)
            if block in bound.prompts:
                raise KwargError(f"prompt is given twice for block {block}")
            bound.prompts[block] = leaf
            return
        family, _, name = kwarg.name.partition(".")
        if family == "param":
            full_name = program.frozen[block].get(name)
        elif family == "peft":
            digest, _, name = name.partition(".")
            if call.adapter is None or call.adapter.digest != digest:
                raise KwargError(f"kwarg {kwarg.name} belongs to an adapter configuration that the call does not bring")
            full_name = program.tuner[block].get(name)
        else:
            raise KwargError(f"kwarg {kwarg.name!r:.100} is no argument, parameter, adapter tensor or prompt of a block")
        if full_name is None and family == "param" and name in dict(self.weights.blocks[block].named_parameters()):
            raise KwargError(f"block {block} holds {name} in {self.weights.quantisation}, and nothing can stand in for it: use quantize=none")
        if full_name is None:
            raise KwargError(f"block {block} has no parameter {name!r:.200} (kwarg {kwarg.name:.200})")
        if full_name in bound.replacements:
            raise KwargError(f"{kwarg.name} is given twice for block {block}")
        expected = program.parent.get_parameter(full_name)
        if expected.shape != leaf.shape or not leaf.is_floating_point():
            raise KwargError(f"kwarg {kwarg.name} has shape {tuple(leaf.shape)}, block {block} takes {tuple(expected.shape)}")
        bound.replacements[full_name] = leaf if family == "peft" else leaf.to(self.dtype)

    def _run(self, program: Program, bound: Bound, hidden_BTH: Tensor) -> Tensor:
        with _prompts(program, bound.prompts, self.span_start(program)):
            output: Tensor = functional_call(
                _Caller(program.parent), {f"parent.{name}": tensor for name, tensor in bound.replacements.items()}, (hidden_BTH,), bound.arguments
            )
        return output

    def span_start(self, program: Program) -> int:
        """First block of a program."""
        return min(program.frozen)

    def _blame(self, program: Program, bound: Bound, call: SpanCall) -> None:
        """Run once more, watching every block, and raise with the first bad one."""
        start, mask = self.span_start(program), bound.arguments.get("attention_mask")
        hidden_BTH = call.hidden_BTH.to(self.device, self.dtype)
        if not _finite(hidden_BTH, mask):
            raise NonFinite(f"the input of block {start} is not finite", None)
        bad: list[int] = []

        def watch(block: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if not _finite(output[0] if isinstance(output, tuple) else output, mask):
                    bad.append(block)

            return hook

        hooks = [layer.register_forward_hook(watch(start + position)) for position, layer in enumerate(program.layers)]
        try:
            self._run(program, bound, hidden_BTH)
        finally:
            for hook in hooks:
                hook.remove()
        block = bad[0] if bad else None
        raise NonFinite(f"the output of block {block} is not finite, and its input is" if bad else "the output of the span is not finite", block)


class _Caller(nn.Module):
    """Gives ``functional_call`` a module whose forward is ours."""

    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.parent = parent
        self.training = parent.training

    def forward(self, hidden_BTH: Tensor, **arguments: Tensor) -> Tensor:
        """Run the span."""
        return call_span(self.parent, hidden_BTH, **arguments)


def _share(layer: nn.Module, block: nn.Module, prefix: str) -> tuple[dict[str, str], dict[str, str]]:
    """Put the stored tensors of ``block`` into ``layer``; returns the names of the tuner's tensors and of the frozen ones."""
    tuner, frozen = {}, {}
    weights = dict(block.named_parameters())
    for name, _ in list(layer.named_parameters()):
        plain = name.replace(".base_layer", "")
        if plain in weights:
            owner_name, _, leaf = name.rpartition(".")
            layer.get_submodule(owner_name)._parameters[leaf] = weights[plain]  # type: ignore[assignment]
            if weights[plain].is_floating_point():  # what is quantised is borrowed with its layer, and means nothing alone
                frozen[plain] = prefix + name
        else:
            tuner[wire_name(name)] = prefix + name
    for name, buffer in block.named_buffers():
        owner_name, _, leaf = name.rpartition(".")
        owner = layer.get_submodule(owner_name)
        getattr(owner, "base_layer", owner)._buffers[leaf] = buffer
    return tuner, frozen


def _check_prompt(call: SpanCall, kwarg: CallKwarg) -> None:
    batch, sequence, hidden = call.hidden_BTH.shape
    batched = kwarg.axes.get("batch") == 0
    if not kwarg.tensor.is_floating_point():
        raise KwargError(f"a prompt must be floating-point, got {kwarg.tensor.dtype}")
    if (
        kwarg.tensor.dim() != 2 + batched
        or kwarg.tensor.shape[-1] != hidden
        or kwarg.tensor.shape[-2] > sequence
        or (batched and kwarg.tensor.shape[0] != batch)
    ):
        raise KwargError(f"a prompt must have shape ([batch,] tokens, hidden) with at most {sequence} tokens, got {tuple(kwarg.tensor.shape)}")


@contextmanager
def _prompts(program: Program, prompts: Mapping[int, Tensor], start: int) -> Iterator[None]:
    """Add each block's prompt to the first positions of its input."""

    def adder(prompt: Tensor) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            hidden_BTH, tokens = args[0], prompt.shape[-2]
            head = hidden_BTH[:, :tokens] + prompt.to(hidden_BTH.dtype)
            return (torch.cat([head, hidden_BTH[:, tokens:]], dim=1), *args[1:]), kwargs

        return hook

    hooks = [program.layers[block - start].register_forward_pre_hook(adder(prompt), with_kwargs=True) for block, prompt in prompts.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _graph_per_block(program: Program) -> Iterator[None]:
    """Let no graph reach from one block into the next, so that it is freed as soon as its block is done."""

    def cut(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        hidden_BTH = args[0].detach().requires_grad_(args[0].requires_grad)
        return (hidden_BTH, *args[1:]), kwargs

    hooks = [layer.register_forward_pre_hook(cut, with_kwargs=True) for layer in program.layers] if torch.is_grad_enabled() else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _finite(hidden_BTH: Tensor, mask_BT: Tensor | None) -> bool:
    """Whether all hidden states that anyone attends to are finite."""
    if bool(torch.isfinite(hidden_BTH.sum())):  # one cheap pass; a sum can overflow, so a bad one is looked at closely
        return True
    finite_BT = torch.isfinite(hidden_BTH).all(dim=-1)
    if mask_BT is not None:
        finite_BT = finite_BT | (mask_BT == 0)
    return bool(finite_BT.all())


def _by_kwarg(call: SpanCall, bound: Bound, grads: list[Tensor]) -> dict[int, Tensor]:
    """Stack the per-block gradients of each kwarg, ascending, in the type in which it came."""
    grouped: dict[int, list[Tensor]] = {}
    for (index, _), grad in zip(bound.leaves, grads, strict=True):
        grouped.setdefault(index, []).append(grad.to("cpu", call.kwargs[index].tensor.dtype))
    return {index: torch.stack(parts) for index, parts in grouped.items()}
