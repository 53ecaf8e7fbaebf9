"""Runnable spans: the library's own model cut to some blocks, with a tuner's layers where a call brings a tuner.

The frozen tensors of all programs are the server's own; a program itself holds names, shapes, and what a tuner computes from its configuration.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig, PreTrainedModel

from servers.dropout import SeededDropout, seed_dropouts
from servers.weights import BlockWeights
from swarmtune.adapters.injection import Injected, TunerTensor, inject_plain, named_tensors, plain_name, travels, unshare, weightless
from swarmtune.adapters.tuners import TUNERS, check_over_quantised, kind_over_base, rebuild
from swarmtune.errors import KwargError, WireError
from swarmtune.skeleton import LayerSite, build_skeleton, init_buffers, truncate
from swarmtune.types import BlockSpan
from swarmtune.wire.frames import WireLimits
from swarmtune.wire.messages import AdapterSpec
from swarmtune.wire.tensors import ALIGNMENT

MAX_PROGRAMS = 64
MAX_PROGRAM_BYTES = 256 << 20
"""Of the tensors that programs hold beside the server's weights; the least recently used go first."""
MAX_INJECTED_BYTES = 2 << 30
"""What PEFT may allocate while it makes a tuner whose tensors need values."""


@dataclass(frozen=True, slots=True)
class Program:
    """A runnable span.

    Attributes:
        parent: the module that loops over the layers.
        layers: its layers, one per block of the span.
        start: the first block.
        tuner: per block, the name as it travels to the names in ``parent``, for each tensor of the tuner that comes with calls.
        frozen: per block, the name within the block to the name in ``parent``, for each frozen parameter that is not quantised.
        dropouts: the adapter's dropout sites.
        own_bytes: of tensors that are not the server's weights.
        storages: addresses of all that it holds, the server's weights included.
    """

    parent: nn.Module
    layers: nn.ModuleList
    start: int
    tuner: Mapping[int, Mapping[str, tuple[str, ...]]]
    frozen: Mapping[int, Mapping[str, str]]
    dropouts: Sequence[SeededDropout]
    own_bytes: int
    storages: frozenset[int]


class Programs:
    """Makes programs, and keeps some of them. Not thread-safe: one device worker uses it."""

    def __init__(self, config: PretrainedConfig, site: LayerSite, weights: BlockWeights, dtype: torch.dtype, device: torch.device) -> None:
        self._config, self._site, self._weights = config, site, weights
        self._dtype, self._device = dtype, device
        self._kept: OrderedDict[tuple[BlockSpan, str], Program] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def own_bytes(self) -> int:
        """Bytes of all that are kept, beside the weights."""
        return sum(program.own_bytes for program in self._kept.values())

    def get(self, span: BlockSpan, adapter: AdapterSpec | None) -> Program:
        """The program for a span and a tuner, made where it is not kept.

        Raises:
            WireError: the configuration does not fit the model.
            AdapterUnsupported: a type that is not right over quantised weights.
        """
        key = (span, adapter.digest if adapter else "")
        program = self._kept.get(key)
        if program is None:
            program = self._kept[key] = self._build(span, adapter)
            self._evict(key)
        self._kept.move_to_end(key)
        return program

    def copy(self, span: BlockSpan, adapter: AdapterSpec | None) -> Program:
        """A program like ``get``'s that only its caller has; its frozen tensors are the same.

        Raises:
            WireError: as ``get``.
        """
        return self._build(span, adapter)

    def _evict(self, newest: tuple[BlockSpan, str]) -> None:
        """Let the least recently used go: of all where there are too many, of those that hold memory where it is too much."""
        while len(self._kept) > MAX_PROGRAMS:
            self._kept.popitem(last=False)
        for key in [key for key, program in self._kept.items() if program.own_bytes and key != newest]:
            if self.own_bytes <= MAX_PROGRAM_BYTES:
                break
            del self._kept[key]

    def _build(self, span: BlockSpan, adapter: AdapterSpec | None) -> Program:
        if adapter is not None:
            self._check(adapter)
        model = build_skeleton(self._config)
        self._weights.prepare(model, self._site)
        tensors: list[TunerTensor] = []
        if adapter is not None:
            injected = self._inject(model, span, adapter)
            model, tensors = injected.model, injected.tensors
        parent = truncate(model, self._site, span.start, span.stop)
        layers = getattr(parent, self._site.attribute)
        unshare(layers)
        frozen: dict[int, dict[str, str]] = {}
        dropouts: list[SeededDropout] = []
        for position, layer in enumerate(layers):
            block = span.start + position
            self._weights.lend(block, layer)
            frozen[block] = _share(layer, self._weights.blocks[block], f"{self._site.attribute}.{position}.")
            if adapter is not None:
                dropouts += seed_dropouts(layer, block)
        init_buffers(parent, model, self._device, {id(item.tensor) for item in tensors})
        coming = [item for item in tensors if adapter is not None and travels(adapter, item)]
        lost = [
            item.name
            for item in tensors
            if item not in coming and item.tensor.is_meta and any(block in item.places for block in range(span.start, span.stop))
        ]
        if lost:
            raise WireError(f"this server cannot compute {lost[0]} of the adapter: update the older of the two sides")
        storages = frozenset(tensor.untyped_storage().data_ptr() for _, tensor in named_tensors(parent) if not tensor.is_meta)
        return Program(parent.eval(), layers, span.start, _places(coming, span, self._site), frozen, dropouts, self._own(parent, span), storages)

    def _check(self, adapter: AdapterSpec) -> None:
        """Refuse what can be refused without a model."""
        rebuild(adapter, self._site.prefix)
        check_over_quantised(kind_over_base(adapter), self._weights.quantisation, str(self._dtype).removeprefix("torch."))

    def _inject(self, model: PreTrainedModel, span: BlockSpan, adapter: AdapterSpec) -> Injected:
        tuner = TUNERS.get(str(adapter.config.get("peft_type")))
        blocks = range(span.start, span.stop)
        if tuner is None or not tuner.materialised:
            return inject_plain(model, adapter, self._site, blocks, meta=True)
        with _bounded(MAX_INJECTED_BYTES), torch.random.fork_rng(devices=[]):
            return inject_plain(weightless(model, self._dtype), adapter, self._site, blocks, meta=False)

    def _own(self, parent: nn.Module, span: BlockSpan) -> int:
        lent = {id(tensor) for block in range(span.start, span.stop) for _, tensor in named_tensors(self._weights.blocks[block])}
        own = {id(tensor): tensor for _, tensor in named_tensors(parent) if id(tensor) not in lent and not tensor.is_meta}
        return sum(tensor.untyped_storage().nbytes() for tensor in own.values())

    def initial(self, span: BlockSpan, names: Sequence[tuple[int, str]], adapter: AdapterSpec | None, rng: Tensor | None) -> list[Tensor]:
        """First values that PEFT computes from body weights, or the body's own parameters (``param.<name>``).

        Raises:
            KwargError: there is no such value, or they are too many for one answer.
            WireError: the configuration or the generator's state does not fit.
        """
        values: dict[tuple[int, str], Tensor] = {}
        if adapter is not None:
            kind = str(adapter.config.get("peft_type"))
            if kind in TUNERS and not TUNERS[kind].derived and not adapter.config.get("copied"):
                raise KwargError(f"no tensor of a {kind} adapter starts from weights of a block")
            values = self._derive(span, adapter, rng)
        parameters = {block: dict(self._weights.blocks[block].named_parameters()) for block in {block for block, _ in names}}
        found = []
        left_bytes = WireLimits().message_bytes
        for block, name in names:
            family, _, within = name.partition(".")
            value = parameters[block].get(within) if family == "param" else values.get((block, name))
            if value is None or (family == "param" and not value.is_floating_point()):
                raise KwargError(f"block {block} has no value {name!r:.200} to start from")
            left_bytes -= value.nbytes + ALIGNMENT
            if left_bytes < 0:
                raise KwargError(f"the first values that a call asks for have more than {WireLimits().message_bytes} bytes: ask for fewer at once")
            found.append(value.detach())
        return [value.to("cpu") for value in found]

    def _derive(self, span: BlockSpan, adapter: AdapterSpec, rng: Tensor | None) -> dict[tuple[int, str], Tensor]:
        """Let PEFT make the tuner over the real weights of ``span``."""
        self._check(adapter)
        if self._weights.quantisation != "none":
            raise WireError(f"first values over {self._weights.quantisation} weights are not served: use quantize=none")
        model = build_skeleton(self._config)
        held_bytes = 0
        for block in range(span.start, span.stop):
            layer = model.get_submodule(f"{self._site.prefix}{block}")
            _share(layer, self._weights.blocks[block], "")
            for part in layer.modules():
                for leaf, parameter in part._parameters.items():
                    if parameter is not None:  # random numbers must come from the same generator as the client's, which is a CPU's
                        part._parameters[leaf] = nn.Parameter(parameter.detach().to("cpu"), requires_grad=False)
                        held_bytes += parameter.nbytes
        weightless(model, self._dtype)
        blocks = None if rng is not None else range(span.start, span.stop)
        # Decompositions and norms take a few passes over the weights.
        with _bounded(MAX_INJECTED_BYTES + 64 * held_bytes), torch.random.fork_rng(devices=[]):
            if rng is not None:
                try:
                    torch.set_rng_state(rng.clone())
                except RuntimeError as error:
                    raise WireError("the state of a random generator is not one") from error
            injected = inject_plain(model, adapter, self._site, blocks, meta=False)
        return {(item.start, item.name): item.tensor for item in injected.tensors}


def _places(tensors: Sequence[TunerTensor], span: BlockSpan, site: LayerSite) -> dict[int, dict[str, tuple[str, ...]]]:
    """Where the tensors that come with calls stand in the cut model, by block and name."""
    found: dict[int, dict[str, tuple[str, ...]]] = {block: {} for block in range(span.start, span.stop)}
    for item in tensors:
        for block in range(max(span.start, item.start), min(span.stop, item.stop)):
            prefix = f"{site.attribute}.{block - span.start}."
            found[block][item.name] = tuple(prefix + name for name in item.places.get(block, ()))
    return found


def _share(layer: nn.Module, block: nn.Module, prefix: str) -> dict[str, str]:
    """Put the stored tensors of ``block`` into ``layer``, below what PEFT has wrapped; returns the names of the frozen parameters."""
    frozen = {}
    weights = dict(block.named_parameters())
    for name, _ in list(layer.named_parameters()):
        plain = plain_name(name)
        if plain in weights:
            owner_name, _, leaf = name.rpartition(".")
            layer.get_submodule(owner_name)._parameters[leaf] = weights[plain]  # type: ignore[assignment]
            if weights[plain].is_floating_point():  # what is quantised is borrowed with its layer, and means nothing alone
                frozen[plain] = prefix + name
    for name, buffer in block.named_buffers():
        owner_name, _, leaf = name.rpartition(".")
        owner: Any = layer.get_submodule(owner_name)
        while hasattr(owner, "base_layer"):
            owner = owner.base_layer
        owner._buffers[leaf] = buffer
    return frozen


_TOO_MUCH = "making this adapter would take more memory than a server gives to one: use smaller ranks"


class _Counting(TorchDispatchMode):
    """Adds up the bytes of new tensors, and refuses to go on above a limit."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._left = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._declared_bytes(func, args, kwargs) > self._left:  # before its pages are touched
            raise WireError(_TOO_MUCH)
        result = func(*args, **kwargs)
        known = {given.untyped_storage().data_ptr() for given in args if isinstance(given, Tensor)}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and not tensor.is_meta and tensor.untyped_storage().data_ptr() not in known:
                self._left -= tensor.untyped_storage().nbytes()
        if self._left < 0:
            raise WireError(_TOO_MUCH)
        return result

    @staticmethod
    def _declared_bytes(func: Any, args: Any, kwargs: Any) -> int:
        """What a function that is told a size will allocate."""
        tensor = next((arg for arg in args if isinstance(arg, Tensor)), None)
        name, sizes = func.__name__, next((arg for arg in args if isinstance(arg, list | tuple)), ())
        if (tensor is not None and not name.startswith(("new_", "repeat."))) or not all(isinstance(size, int) for size in sizes):
            return 0
        dtype = kwargs.get("dtype") or (torch.get_default_dtype() if tensor is None else tensor.dtype)
        return math.prod(sizes) * int(dtype.itemsize) * (tensor.numel() if name.startswith("repeat.") and tensor is not None else 1)


@contextmanager
def _bounded(limit: int) -> Iterator[None]:
    """Bound what is allocated inside."""
    with _Counting(limit):
        yield
