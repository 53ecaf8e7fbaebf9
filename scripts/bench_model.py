"""The model, the adapter and the training step that every measurement uses, and a clock on the blocks of a local model."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BloomConfig

from swarmtune.errors import UsageError
from swarmtune.remote.pipeline import Pipelined

HEADS, VOCABULARY, RANK = 16, 4096, 8
Moment = Any
"""Seconds of a clock, or an event on a GPU."""


def reference_model(hidden: int, layers: int, directory: Path) -> Path:
    """Save a BLOOM with random weights."""
    torch.manual_seed(0)
    config = BloomConfig(hidden_size=hidden, n_layer=layers, n_head=HEADS, vocab_size=VOCABULARY)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def lora() -> LoraConfig:
    """The adapter that learns."""
    return LoraConfig(r=RANK, target_modules=["query_key_value"], task_type="CAUSAL_LM")


def local_peft(path: Path, dtype: str, device: str = "cpu") -> nn.Module:
    """The whole model here, with the adapter; after the same seed its first values are those of a remote one."""
    torch.manual_seed(1)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)), lora()).to(device)


def token_ids(rows: int, sequence: int) -> Tensor:
    """A batch."""
    return torch.randint(0, VOCABULARY, (rows, sequence), generator=torch.Generator().manual_seed(1))


def spans_of(layers: int, servers: int) -> list[str]:
    """Equal shares of the blocks.

    Raises:
        UsageError: there are fewer blocks than servers.
    """
    if servers > layers:
        raise UsageError(f"{servers} servers cannot share {layers} blocks: ask for at most {layers} servers")
    edges = [round(index * layers / servers) for index in range(servers + 1)]
    return [f"{start}:{stop}" for start, stop in itertools.pairwise(edges)]


class BodyClock:
    """Seconds that the blocks of a local model take in training steps, forward and backward, read by hooks on the first and the last one.

    The stem is frozen, so the backward of the blocks is the last thing that a backward does: ``backward_ended`` closes it.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
        self._device = next(layers.parameters()).device
        self._began = self._now()
        self.reset()
        layers[0].register_forward_pre_hook(self._forward_begins)
        layers[-1].register_forward_hook(self._forward_ended)

    def reset(self) -> None:
        """Begin at zero."""
        self._forwards: list[tuple[Moment, Moment]] = []
        self._backwards: list[tuple[Moment, Moment]] = []

    @property
    def forward_s(self) -> float:
        """Of all forwards."""
        return self._sum(self._forwards)

    @property
    def backward_s(self) -> float:
        """Of all backwards."""
        return self._sum(self._backwards)

    def backward_ended(self) -> None:
        """A backward is over."""
        self._backwards.append((self._began, self._now()))

    def _forward_begins(self, *_: object) -> None:
        self._began = self._now()

    def _forward_ended(self, layer: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        self._forwards.append((self._began, self._now()))
        hidden = output[0] if isinstance(output, tuple) else output
        hidden.register_hook(self._backward_begins)

    def _backward_begins(self, grad: Tensor) -> None:
        self._began = self._now()

    def _now(self) -> Moment:
        """A point in the work of the device, which is not waited for."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _sum(self, spans: Sequence[tuple[Moment, Moment]]) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return sum(end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3 for begin, end in spans)


def trainer(model: nn.Module, ids: Tensor, piece_rows: int | None = None, clock: BodyClock | None = None) -> Callable[[], float]:
    """A function that takes one optimizer step as a ``LightningModule`` does, and gives the loss; of a large batch, some rows at a time."""
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)
    pipelined = Pipelined(model)

    def run() -> float:
        optimizer.zero_grad()
        total = 0.0
        for piece in ids.split(piece_rows or len(ids)):
            given, share = {"input_ids": piece, "labels": piece}, len(piece) / len(ids)
            loss = pipelined(given, share)
            loss = (model(**given).loss if loss is None else loss) * share
            loss.backward()
            if clock is not None:
                clock.backward_ended()
            total += loss.item()
        optimizer.step()
        return total

    return run


def per_call(run: Callable[[], object], count: int = 200, warm_up: int = 20) -> list[float]:
    """Seconds of each of ``count`` calls, after some that are not counted."""
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(count):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return times


def middle_half(values: list[float], digits: int = 3) -> str:
    """The quartiles around the median, or the one value there is."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{low:.{digits}f} to {high:.{digits}f}"


@contextlib.contextmanager
def thread_budget(options: argparse.Namespace) -> Iterator[None]:
    """This process computes with as many threads as each server."""
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
