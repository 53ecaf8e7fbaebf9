"""Door 9: hidden states and kwargs through frozen layers, forward and backward, in one piece.

A program is the library's own model cut to a span, with a tuner's layers injected where a call brings a tuner; its frozen tensors are shared with
all other programs, and the client's tensors take the place of its learnable ones for the length of one call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import DynamicCache, PretrainedConfig

from servers.compiled import Compiler, NotCompiled
from servers.dropout import DropoutPlan, active
from servers.gradients import Graph, gradients, to_host
from servers.graphs import GraphGone, Graphs, Tape
from servers.program import Program, Programs
from servers.sums import NoRoom, Sums
from servers.weights import BlockWeights
from swarmtune.errors import KwargError, NonFinite
from swarmtune.skeleton import LayerSite, call_span, hidden_size, in_dtype
from swarmtune.types import BlockSpan
from swarmtune.wire.initial import InitialCall, InitialResult
from swarmtune.wire.kept import KeptCall
from swarmtune.wire.messages import CallKwarg, SpanCall, SpanResult, fits_an_answer

NOT_ARGUMENTS = frozenset(
    (
        *("self", "args", "kwargs", "input_ids", "inputs_embeds", "past_key_values", "use_cache", "cache_position", "return_dict", "labels"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "logits_to_keep"),
    )
)
"""Parameters of the library's forward that are no kwargs of a call: the input itself, caches, and what is to be returned."""
ROW_ARGUMENTS = ("attention_mask", "position_ids")
"""Arguments of shape (batch, sequence)."""
GRAPH_BYTES, GRAPH_TTL_S = 1 << 30, 600.0
"""How much may be kept for backwards, and for how long, where nobody has said."""
PREFIX = ("prefix.key", "prefix.value")
MAX_CACHE_BYTES = 4 << 30
"""Keys and values of one call with prefixes, those of its own tokens included."""


@dataclass(slots=True)
class Bound:
    """A call's tensors, sorted by what they do.

    Attributes:
        replacements: by name in the program.
        arguments: of the library's forward.
        prompts: by block.
        prefixes: keys and values by block.
        leaves: index of the kwarg, its block, and what its gradient is taken by.
        given: block and name of everything that a block got.
    """

    replacements: dict[str, Tensor] = field(default_factory=dict)
    arguments: dict[str, Tensor] = field(default_factory=dict)
    prompts: dict[int, Tensor] = field(default_factory=dict)
    prefixes: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    leaves: list[tuple[int, int, Tensor]] = field(default_factory=list)
    given: set[tuple[int, str]] = field(default_factory=set)


class Span:
    """The blocks that one server holds. Not thread-safe: one device worker runs it.

    Attributes:
        graphs: what forwards have left behind.
        sums: gradients that wait for those of other micro-batches.
        block_forwards: blocks run forward so far, those that a backward runs again included.
        compiler: of programs for calls that allow compiled ones; ``None`` where nothing is compiled.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        site: LayerSite,
        span: BlockSpan,
        weights: BlockWeights,
        dtype: torch.dtype,
        device: torch.device,
        graphs: Graphs | None = None,
    ) -> None:
        self.config, self.site, self.span, self.weights = in_dtype(config, dtype), site, span, weights
        self.dtype, self.device = dtype, device
        self.programs = Programs(self.config, site, weights, dtype, device)
        self.sums = Sums()
        self.graphs = Graphs(GRAPH_BYTES, GRAPH_TTL_S) if graphs is None else graphs  # an empty one is false
        self.block_forwards = 0
        self.compiler: Compiler | None = None

    def forward(self, call: SpanCall, client: str = "") -> SpanResult:
        """Run the called blocks; where the call asks to keep the graph and there is room, it stays behind under a handle of ``client``.

        Where a backward will follow and no graph is kept, each block is run with a graph, which ends with the block: torch picks other kernels with
        one than without (of attention with a learned mask, of convolutions), and a local model would be run with one.

        Raises:
            KwargError: the call does not fit these blocks.
            NonFinite: an output is not finite; says which block first.
        """
        self.graphs.release(client, call.release)
        return self._on_program(call, lambda program: self._forward(program, call, client))

    def _on_program(self, call: SpanCall, run: Callable[[Program], SpanResult]) -> SpanResult:
        """Run on the compiled program, where the call allows that and there is one, else on the eager one."""
        compiled = self.compiler.program(call) if call.compile and self.compiler is not None else None
        if compiled is not None:
            assert self.compiler is not None, "it has just been asked"
            try:
                return replace(run(compiled), compiled=True)
            except NotCompiled:
                self.compiler.refused(call)
        return run(self._program(call))

    def _forward(self, program: Program, call: SpanCall, client: str) -> SpanResult:
        bound = self._bind(program, call)
        hidden_BTH = call.hidden_BTH.to(self.device, self.dtype).detach().requires_grad_(call.input_grad)
        trains = call.input_grad or bool(bound.leaves)
        room = self.graphs.budget_bytes if call.keep and trains and fits_an_answer(call) else 0
        tape = Tape(room, program.storages)
        with torch.set_grad_enabled(trains), tape.recording() if not tape.full else _graph_per_block(program), _blamed_on(call):
            output_BTH = self._run(program, bound, call, hidden_BTH)
            if not _finite(output_BTH.detach(), bound.arguments.get("attention_mask")):
                self._blame(program, bound, call)
        handle = 0
        if output_BTH.requires_grad and not tape.full:
            for tensor in (output_BTH, hidden_BTH, *(leaf for _, _, leaf in bound.leaves)):
                tape.count(tensor)
            handle = self.graphs.keep(client, _graph(call, bound, hidden_BTH, output_BTH, tape.held_bytes))
        return SpanResult(to_host(output_BTH.detach(), call.hidden_BTH.dtype), handle=handle)

    def backward(self, call: SpanCall, client: str = "") -> SpanResult:
        """Run the called blocks again with a graph, and return the gradients that the call asks for.

        Raises:
            KwargError: the call does not fit these blocks.
        """
        if not (call.input_grad or any(kwarg.requires_grad for kwarg in call.kwargs)):
            self._bind(self._program(call), call)
            return SpanResult(None)
        return self._on_program(call, lambda program: self._backward(program, call, client))

    def _backward(self, program: Program, call: SpanCall, client: str) -> SpanResult:
        assert call.grad_BTH is not None, "a backward has a gradient"
        bound = self._bind(program, call)
        hidden_BTH = call.hidden_BTH.to(self.device, self.dtype).detach().requires_grad_(call.input_grad)
        with torch.enable_grad(), _blamed_on(call):
            graph = _graph(call, bound, hidden_BTH, self._run(program, bound, call, hidden_BTH))
            result = gradients(graph, call.grad_BTH, call.input_grad)
        return self._added(graph, call, result, client)

    def compile_in_background(self) -> None:
        """From now on, calls that allow it run compiled programs, once there are some."""
        self.compiler = Compiler(lambda call: self.programs.copy(call.span, call.adapter), self._rehearse)

    def _rehearse(self, program: Program, call: SpanCall) -> None:
        """Compile whatever calls like this one need: a forward whose graph is kept or not, and the backward; each twice, to see that it is enough."""
        for recording in (True, True, False, False):
            bound = self._bind(program, call)
            learns = (call.keep or call.grad_BTH is not None) and (call.input_grad or bool(bound.leaves))
            hidden_BTH = call.hidden_BTH.to(self.device, self.dtype).detach().requires_grad_(call.input_grad)
            around = Tape(1 << 62, program.storages).recording() if recording and learns else _graph_per_block(program)
            with torch.set_grad_enabled(call.input_grad or bool(bound.leaves)), around:
                output_BTH = self._run(program, bound, call, hidden_BTH, counted=False)
            if learns and recording:
                gradients(_graph(call, bound, hidden_BTH, output_BTH), torch.zeros_like(output_BTH), call.input_grad)
        if call.keep or call.grad_BTH is not None:  # a lost graph's backward runs forward without a tape
            with torch.enable_grad():
                bound = self._bind(program, call)
                hidden_BTH = call.hidden_BTH.to(self.device, self.dtype).detach().requires_grad_(call.input_grad)
                if bound.leaves or call.input_grad:
                    output_BTH = self._run(program, bound, call, hidden_BTH, counted=False)
                    gradients(_graph(call, bound, hidden_BTH, output_BTH), torch.zeros_like(output_BTH), call.input_grad)

    def kept_backward(self, call: KeptCall, client: str) -> SpanResult:
        """Go back through the graph that a forward has left behind.

        Raises:
            GraphGone: it is not here any more, or is not what the call describes.
        """
        graph = self.graphs.take(client, call.handle)
        if graph.span != call.span or graph.output_BTH.shape != call.grad_BTH.shape or (call.input_grad and graph.input_BTH is None):
            raise GraphGone(f"what is kept under handle {call.handle} does not fit the call: send the inputs")
        return self._added(graph, call, gradients(graph, call.grad_BTH, call.input_grad), client)

    def _added(self, graph: Graph, call: SpanCall | KeptCall, result: SpanResult, client: str) -> SpanResult:
        """Hold back what is wanted as a sum, or give the sum where this was the last micro-batch."""
        if call.sum is None:
            return result
        shared = {index: grad for index, grad in result.kwarg_grads.items() if graph.kwargs[index][2]}
        own = {index: grad for index, grad in result.kwarg_grads.items() if index not in shared}
        try:
            sums = self.sums.add(client, call.span, call.sum, shared)
        except NoRoom:
            return result
        if sums is None:
            return replace(result, kwarg_grads=own, withheld=True)
        return replace(result, kwarg_grads={**own, **sums}, summed=tuple(range(call.sum.count)))

    def initial(self, call: InitialCall) -> InitialResult:
        """First values that depend on the weights of these blocks.

        Raises:
            KwargError: there is no such value.
        """
        assert self.span.covers(call.span), "the handler has checked the span"
        random = call.rng is not None or call.adapter is not None
        with self.compiler.not_now() if self.compiler is not None and random else nullcontext():
            return InitialResult(tuple(self.programs.initial(call.span, call.names, call.adapter, call.rng)))

    def _program(self, call: SpanCall) -> Program:
        assert self.span.covers(call.span), "the handler has checked the span"
        if call.hidden_BTH.shape[-1] != hidden_size(self.config):
            raise KwargError(f"hidden states have width {call.hidden_BTH.shape[-1]}, this model's have {hidden_size(self.config)}")
        return self.programs.get(call.span, call.adapter)

    def _bind(self, program: Program, call: SpanCall) -> Bound:
        """Sort the kwargs into parameters, library arguments, prompts and prefixes; every tensor of the tuner must be there."""
        bound = Bound()
        for index, kwarg in enumerate(call.kwargs):
            if not call.span.covers(kwarg.blocks):
                raise KwargError(f"kwarg {kwarg.name} is for blocks {kwarg.blocks}, the call is for {call.span}")
            if "." not in kwarg.name and kwarg.name != "prompt":
                leaf = self._leaf(kwarg)
                self._bind_argument(program, call, kwarg, leaf, bound)
                if kwarg.requires_grad:
                    bound.leaves.append((index, kwarg.blocks.start, leaf))
                continue
            for block in range(kwarg.blocks.start, kwarg.blocks.stop):
                leaf = self._leaf(kwarg)
                if (block, kwarg.name) in bound.given:
                    raise KwargError(f"{kwarg.name} is given twice for block {block}")
                bound.given.add((block, kwarg.name))
                self._bind_block(program, call, kwarg, block, leaf, bound)
                if kwarg.requires_grad:
                    bound.leaves.append((index, block, leaf))
        self._check_complete(program, call, bound)
        return bound

    def _check_complete(self, program: Program, call: SpanCall, bound: Bound) -> None:
        if call.adapter is not None:
            for block, names in program.tuner.items():
                for name, places in names.items():
                    if places and (block, f"peft.{call.adapter.digest}.{name}") not in bound.given:
                        raise KwargError(f"the call brings an adapter configuration but not its tensor {name} for block {block}")
        if bound.prefixes:
            for block in range(call.span.start, call.span.stop):
                pair = bound.prefixes.get(block, {})
                if set(pair) != set(PREFIX) or len({tensor.shape for tensor in pair.values()}) != 1:
                    raise KwargError(f"block {block} needs prefix.key and prefix.value of one shape, as the other blocks of the call have them")
            if len({pair[PREFIX[0]].shape[-2] for pair in bound.prefixes.values()}) != 1:
                raise KwargError("the prefixes of all blocks must have the same number of tokens")

    def _leaf(self, kwarg: CallKwarg) -> Tensor:
        """A copy of what needs a gradient: a kept graph that held on to it would hold the whole message that brought it."""
        return kwarg.tensor.to(self.device, copy=True).requires_grad_() if kwarg.requires_grad else kwarg.tensor.to(self.device)

    def _bind_argument(self, program: Program, call: SpanCall, kwarg: CallKwarg, leaf: Tensor, bound: Bound) -> None:
        taken = inspect.signature(program.parent.forward).parameters
        if kwarg.name in ROW_ARGUMENTS and kwarg.name not in taken:
            raise KwargError(f"{type(program.parent).__name__} takes no {kwarg.name}")
        if kwarg.name not in taken or kwarg.name in NOT_ARGUMENTS:
            raise KwargError(
                f"kwarg {kwarg.name!r:.100} is no argument of {type(program.parent).__name__}, and no parameter, adapter tensor or prompt of a block"
            )
        if kwarg.blocks != call.span:
            raise KwargError(f"{kwarg.name} must be for all blocks")
        if kwarg.name in bound.arguments:
            raise KwargError(f"{kwarg.name} is given twice")
        if kwarg.name in ROW_ARGUMENTS:
            rows = kwarg.tensor.shape[0] if kwarg.tensor.dim() else 0
            if kwarg.tensor.dim() != 2 or kwarg.tensor.shape[1] != call.hidden_BTH.shape[1] or rows not in (1, call.hidden_BTH.shape[0]):
                raise KwargError(
                    f"{kwarg.name} must have shape (batch, sequence) = {tuple(call.hidden_BTH.shape[:2])}, got {tuple(kwarg.tensor.shape)}"
                )
            if kwarg.requires_grad:
                raise KwargError(f"{kwarg.name} has no gradient")
            if kwarg.name == "position_ids" and leaf.dtype is torch.bool:
                raise KwargError("position_ids must be numbers")
            if kwarg.name == "attention_mask":  # not every model's code broadcasts it
                leaf = leaf.expand(call.hidden_BTH.shape[0], -1)
        bound.arguments[kwarg.name] = leaf

    def _bind_block(self, program: Program, call: SpanCall, kwarg: CallKwarg, block: int, leaf: Tensor, bound: Bound) -> None:
        if kwarg.name == "prompt":
            _check_prompt(call, kwarg)
            bound.prompts[block] = leaf
            return
        if kwarg.name in PREFIX:
            _check_prefix(call, kwarg)
            bound.prefixes.setdefault(block, {})[kwarg.name] = leaf
            return
        family, _, name = kwarg.name.partition(".")
        if family == "param":
            places = self._param_place(program, kwarg, block, name)
        elif family == "peft":
            digest, _, name = name.partition(".")
            if call.adapter is None or call.adapter.digest != digest:
                raise KwargError(f"kwarg {kwarg.name} belongs to an adapter configuration that the call does not bring")
            if name not in program.tuner[block]:
                raise KwargError(f"block {block} has no parameter {name!r:.200} (kwarg {kwarg.name:.200})")
            places = program.tuner[block][name]
        else:
            raise KwargError(f"kwarg {kwarg.name!r:.100} is no argument, parameter, adapter tensor, prompt or prefix of block {block}")
        for place in places:
            _check_parameter(program, kwarg, block, place, leaf)
            if place in bound.replacements:
                raise KwargError(f"{kwarg.name} is given twice for block {block}")
            bound.replacements[place] = _cast(program, place, leaf) if family == "peft" else leaf.to(self.dtype)

    def _param_place(self, program: Program, kwarg: CallKwarg, block: int, name: str) -> tuple[str, ...]:
        place = program.frozen[block].get(name)
        if place is None and name in dict(self.weights.blocks[block].named_parameters()):
            raise KwargError(f"block {block} holds {name} in {self.weights.quantisation}, and nothing can stand in for it: use quantize=none")
        if place is None:
            raise KwargError(f"block {block} has no parameter {name!r:.200} (kwarg {kwarg.name:.200})")
        return (place,)

    def _run(self, program: Program, bound: Bound, call: SpanCall, hidden_BTH: Tensor, counted: bool = True) -> Tensor:
        plan = None if call.dropout is None else DropoutPlan(call.dropout.seed, call.dropout.first_row)
        arguments: dict[str, Any] = dict(bound.arguments)
        if bound.prefixes:
            arguments |= self._prefixed(program, bound, hidden_BTH)
        self.block_forwards += len(program.layers) * counted
        replacements = {f"parent.{name}": tensor for name, tensor in bound.replacements.items()}
        with _prompts(program, bound.prompts), active(program.dropouts, plan):
            # Tied names are given one by one, because a tuner's shared tensors have several.
            output: Tensor = functional_call(_Caller(program.parent), replacements, (hidden_BTH,), arguments, tie_weights=False)
        return output

    def _prefixed(self, program: Program, bound: Bound, hidden_BTH: Tensor) -> dict[str, Any]:
        """A cache that holds the prefixes, and the mask that goes with it."""
        rows, sequence = hidden_BTH.shape[:2]
        keys = [pair[PREFIX[0]] for pair in bound.prefixes.values()]
        cache_bytes = sum(2 * rows * key.shape[-3] * (key.shape[-2] + sequence) * key.shape[-1] * self.dtype.itemsize for key in keys)
        if cache_bytes > MAX_CACHE_BYTES:
            raise KwargError(
                f"the keys and values of this call with its prefix would have {cache_bytes} bytes, over the limit of {MAX_CACHE_BYTES}: "
                "use a shorter prefix or lower micro_batch_tokens"
            )
        pairs = []
        for _, pair in sorted(bound.prefixes.items()):
            tensors = (pair[name].to(self.dtype) for name in PREFIX)
            pairs.append(tuple(tensor if tensor.dim() == 4 else tensor.expand(rows, *tensor.shape) for tensor in tensors))
        found: dict[str, Any] = {"past_key_values": _SpanCache(pairs, program.start)}
        mask = bound.arguments.get("attention_mask")
        if mask is not None:
            found["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], pairs[0][0].shape[2]), mask], dim=1)
        return found

    def _blame(self, program: Program, bound: Bound, call: SpanCall) -> None:
        """Run once more, watching every block, and raise with the first bad one."""
        start, mask = program.start, bound.arguments.get("attention_mask")
        hidden_BTH = call.hidden_BTH.to(self.device, self.dtype)
        if not _finite(hidden_BTH, mask):
            raise NonFinite(f"the input of block {start} is not finite", None)
        for kwarg in call.kwargs:
            if kwarg.tensor.is_floating_point() and not bool(torch.isfinite(kwarg.tensor).all()):
                raise NonFinite(f"kwarg {kwarg.name} for blocks {kwarg.blocks} holds NaN or infinity", kwarg.blocks.start)
        bad: list[int] = []

        def watch(block: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if not _finite(output[0] if isinstance(output, tuple) else output, mask):
                    bad.append(block)

            return hook

        hooks = [layer.register_forward_hook(watch(start + position)) for position, layer in enumerate(program.layers)]
        try:
            self._run(program, bound, call, hidden_BTH)
        finally:
            for hook in hooks:
                hook.remove()
        block = bad[0] if bad else None
        raise NonFinite(f"the output of block {block} is not finite, and its input is" if bad else "the output of the span is not finite", block)


def _graph(call: SpanCall, bound: Bound, hidden_BTH: Tensor, output_BTH: Tensor, held_bytes: int = 0) -> Graph:
    kwargs = {index: (call.kwargs[index].blocks, call.kwargs[index].tensor.dtype, not call.kwargs[index].axes) for index, _, _ in bound.leaves}
    return Graph(output_BTH, hidden_BTH if call.input_grad else None, bound.leaves, kwargs, held_bytes, call.span)


class _SpanCache(DynamicCache):
    """A cache of the blocks from ``start`` on: layers keep their numbers in the whole model, which is how they ask for their entry."""

    def __init__(self, pairs: Sequence[tuple[Tensor, ...]], start: int) -> None:
        self._start = 0  # while the entries are put in
        super().__init__(pairs)
        self._start = start

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See the library."""
        return super().update(key_states, value_states, layer_idx - self._start, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens in the cache, the same for all blocks."""
        return int(super().get_seq_length(0))


class _Caller(nn.Module):
    """Gives ``functional_call`` a module whose forward is ours."""

    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.parent = parent
        self.training = parent.training

    def forward(self, hidden_BTH: Tensor, **arguments: Tensor) -> Tensor:
        """Run the span."""
        return call_span(self.parent, hidden_BTH, **arguments)


def _check_parameter(program: Program, kwarg: CallKwarg, block: int, place: str, leaf: Tensor) -> None:
    """What stands in for a tensor of the program must look like it."""
    owner_name, _, name = place.rpartition(".")
    owner = program.parent.get_submodule(owner_name)
    expected = owner._parameters[name] if name in owner._parameters else owner._buffers[name]
    assert expected is not None, "names of a program come from its tensors"
    if expected.shape != leaf.shape or expected.is_floating_point() != leaf.is_floating_point():
        raise KwargError(
            f"kwarg {kwarg.name} has shape {tuple(leaf.shape)} and type {leaf.dtype}, block {block} takes {tuple(expected.shape)} {expected.dtype}"
        )
    if not leaf.is_floating_point():
        size = _index_range(program.parent, owner_name)
        if leaf.numel() and (int(leaf.min()) < 0 or int(leaf.max()) >= size):
            raise KwargError(f"kwarg {kwarg.name} holds indices outside of the {size} that there are")


def _cast(program: Program, place: str, leaf: Tensor) -> Tensor:
    """A tuner's tensor as a program computes with it: copies of norms and biases in the served half type, small matrices as they came."""
    owner_name, _, name = place.rpartition(".")
    owner = program.parent.get_submodule(owner_name)
    found = owner._parameters[name] if name in owner._parameters else owner._buffers[name]
    assert found is not None, "names of a program come from its tensors"
    return leaf.to(found.dtype) if found.dtype in (torch.float16, torch.bfloat16) else leaf


def _index_range(parent: nn.Module, owner_name: str) -> int:
    """How far indices below a tuner's module may point: into its square matrix where it says how large that is, else into the weights below it."""
    while owner_name:
        owner: Any = parent.get_submodule(owner_name)
        if isinstance(getattr(owner, "size", None), int):
            return int(owner.size)
        if hasattr(owner, "base_layer"):
            return int(owner.base_layer.weight.numel())
        owner_name = owner_name.rpartition(".")[0]
    return 0


def _check_prefix(call: SpanCall, kwarg: CallKwarg) -> None:
    batched = kwarg.axes.get("batch") == 0
    if not kwarg.tensor.is_floating_point() or kwarg.tensor.dim() != 3 + batched or 0 in kwarg.tensor.shape:
        raise KwargError(
            f"{kwarg.name} must be floating-point ([batch,] key heads, tokens, head width), got {kwarg.tensor.dtype} {tuple(kwarg.tensor.shape)}"
        )
    if batched and kwarg.tensor.shape[0] != call.hidden_BTH.shape[0]:
        raise KwargError(f"{kwarg.name} has {kwarg.tensor.shape[0]} rows, the call has {call.hidden_BTH.shape[0]}")


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
def _blamed_on(call: SpanCall) -> Iterator[None]:
    """What the libraries cannot compute is the fault of a tuner, a prefix or an argument that the call brings; a failing device is not.

    Raises:
        NonFinite: one of the call's tensors is not finite, so it may be that.
        KwargError: with the library's own words.
    """
    try:
        yield
    except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        checked = ("prompt", *ROW_ARGUMENTS)  # and what stands in for parameters; the rest only the library can judge
        plain = call.adapter is None and all(kwarg.name in checked or kwarg.name.startswith("param.") for kwarg in call.kwargs)
        detail = (str(error) or type(error).__name__).splitlines()[0][:300]
        if plain or isinstance(error, torch.AcceleratorError) or any(word in str(error).lower() for word in ("cuda", "cublas", "memory")):
            raise
        for kwarg in call.kwargs:
            if kwarg.tensor.is_floating_point() and not bool(torch.isfinite(kwarg.tensor).all()):
                raise NonFinite(f"kwarg {kwarg.name} for blocks {kwarg.blocks} holds NaN or infinity", kwarg.blocks.start) from error
        raise KwargError(f"blocks {call.span} cannot be computed with what the call brings: {detail}") from error


@contextmanager
def _prompts(program: Program, prompts: Mapping[int, Tensor]) -> Iterator[None]:
    """Add each block's prompt to the first positions of its input."""

    def adder(prompt: Tensor) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            hidden_BTH, tokens = args[0], prompt.shape[-2]
            head = hidden_BTH[:, :tokens] + prompt.to(hidden_BTH.dtype)
            return (torch.cat([head, hidden_BTH[:, tokens:]], dim=1), *args[1:]), kwargs

        return hook

    hooks = [program.layers[block - program.start].register_forward_pre_hook(adder(prompt), with_kwargs=True) for block, prompt in prompts.items()]
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
