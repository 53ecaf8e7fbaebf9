"""What a span will take of memory, estimated from its meta skeleton before anything is loaded, and what is free."""

from __future__ import annotations

import asyncio
import ctypes
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn, Protocol

import torch
from torch import nn
from transformers import PretrainedConfig

from swarmtune.errors import UsageError
from swarmtune.skeleton import LayerSite, build_skeleton, hidden_size, stored_dtype
from swarmtune.types import BlockSpan

logger = logging.getLogger(__name__)

GIB = 1 << 30
IDLE_S = 10.0
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""Names of glibc's ``malloc.h``."""
SCORE_BYTES = 6
"""Kept per attention score by eager attention: the float32 softmax and its copy in half precision."""


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes on the device that computes.

    Attributes:
        weights: what stays: parameters, buffers, and the scales of quantised matrices.
        loading: on top of that while loading, at most.
        work: on top of the weights during the largest call that is allowed.
    """

    weights: int
    loading: int
    work: int


def estimate(
    config: PretrainedConfig,
    site: LayerSite,
    span: BlockSpan,
    dtype: torch.dtype,
    quantise: str,
    device: torch.device,
    *,
    max_tokens: int,
    max_sequence: int,
) -> MemoryNeed:
    """What ``span`` will take.

    Weights: elements times bytes of ``dtype``; a quantised matrix takes ``servers.quantize.weight_bytes``. Exact up to tables that the library
    computes (rotary).

    Loading: unquantised, the largest tensor as stored. Quantised, the largest block in ``dtype`` while it lies on the CPU beside its quantised form,
    and 16 bytes per element of the largest matrix while what was packed is compared with what was stored.

    Work, per block, of a backward with LoRA on every linear layer: 4 bytes x tokens x (inputs and outputs of all linear layers + 4 hidden sizes), and
    with eager attention 6 bytes x tokens x sequence x heads. It has the form of equation 1 of Korthikanti et al. 2022 (arXiv:2205.05198) without
    dropout, with the layers counted instead of assumed, and lies 7 to 55 % above what autograd was seen to keep for BLOOM, LLaMA and GPT-NeoX.
    """
    skeleton = build_skeleton(config)
    layers = skeleton.get_submodule(f"{site.parent_name}.{site.attribute}")
    assert isinstance(layers, nn.ModuleList)
    blocks = [layers[number] for number in range(span.start, span.stop)]
    weights = sum(_held(block, dtype, quantise) for block in blocks)
    tensors = [parameter.numel() for block in blocks for parameter in block.parameters()]
    if quantise == "none":
        loading = max(tensors) * stored_dtype(config).itemsize
    else:
        loading = 16 * max(tensors) + (max(_held(block, dtype, "none") for block in blocks) if device.type == "cpu" else 0)
    text = config.get_text_config()
    scores = SCORE_BYTES * max_sequence * int(text.num_attention_heads) if skeleton.config._attn_implementation == "eager" else 0
    widths = sum(_linear_width(block) + 4 * hidden_size(config) for block in blocks)
    return MemoryNeed(weights, loading, max_tokens * (4 * widths + scores * len(blocks)))


def check_fits(need: MemoryNeed, span: BlockSpan, device: torch.device, *, refuse: bool = True) -> None:
    """Say what will be taken and what is free, before it is taken.

    Raises:
        UsageError: the weights cannot fit, and ``refuse``.
    """
    free = free_bytes(device)
    total = f"blocks {span} need about {_gib(need.weights + need.work)} GiB (weights {_gib(need.weights)}, work {_gib(need.work)} at most)"
    if free is None:
        logger.info("%s; how much is free is not known here", total)
        return
    logger.info("%s; %s GiB are free", total, _gib(free))
    least = need.weights + need.loading
    if least > free and refuse:
        raise UsageError(
            f"loading blocks {span} takes about {_gib(least)} GiB and {_gib(free)} GiB are free on {device.type}: serve fewer blocks=, "
            "use quantize=int8 or nf4 or a smaller dtype=, or load them all the same with memory_check=false"
        )
    if need.weights + need.work > free:
        logger.warning("the largest call allowed may not fit into memory: lower max_tokens or max_sequence, or serve fewer blocks")


def activation_budget(device: torch.device) -> int:
    """Bytes of activations to keep for backwards, where nobody has said: a quarter of what is free once the weights are loaded."""
    free = free_bytes(device)
    return GIB if free is None else free // 4


class Busyness(Protocol):
    """What tells whether a server has something to do."""

    calls: int
    in_flight: int

    @property
    def held_bytes(self) -> int:
        """What it keeps between calls."""


def keep_what_is_freed() -> None:
    """Have glibc's malloc take tensors of any size from one heap, and keep what is freed for the next call.

    As it comes, it maps tensors above 32 MiB anew each time and gives the ends of heaps back while calls run, so the kernel clears the same pages
    again and again: 5 % of a step, more with tensors above 32 MiB. ``trim_when_idle`` gives back. Other allocators, tcmalloc among them, take no
    notice.
    """
    with suppress(AttributeError, OSError, TypeError):
        for name, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):  # -1 is the largest size
            ctypes.CDLL(None).mallopt(name, value)


async def trim_when_idle(work: Busyness, idle_s: float = IDLE_S) -> NoReturn:
    """Give the system back what malloc keeps for the next call, once there has been none for a while.

    Taking it anew makes the first step after that slower, so it stays while calls come.
    """
    trim = trimming()
    before, trimmed = (work.calls, work.held_bytes), None
    while True:
        await asyncio.sleep(idle_s)
        now = (work.calls, work.held_bytes)
        if now == before and now != trimmed and not work.in_flight:
            if trim is not None:
                await asyncio.to_thread(trim)
            if torch.cuda.is_initialized() and hasattr(torch.accelerator, "empty_host_cache"):
                torch.accelerator.empty_host_cache()  # pinned memory of results
            trimmed = now
        before = now


def trimming() -> Callable[[], object] | None:
    """What makes the allocator of this process give back what is free: of tcmalloc, where it was preloaded, or of glibc; ``None`` for others."""
    for name, arguments in (("MallocExtension_ReleaseFreeMemory", ()), ("malloc_trim", (0,))):
        try:
            return partial(getattr(ctypes.CDLL(None), name), *arguments)
        except (AttributeError, OSError, TypeError):
            continue
    return None


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be taken on ``device`` now; ``None`` where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [
        free for free in (_available(Path("/proc/meminfo")), _free_in_group(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))) if free is not None
    ]
    return min(found) if found else None


def _held(block: nn.Module, dtype: torch.dtype, quantise: str) -> int:
    """Bytes of one block once it is loaded."""
    total = 0
    for module in block.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if quantise != "none" and isinstance(module, nn.Linear) and name == "weight":
                from servers.quantize import weight_bytes

                total += weight_bytes(module.out_features, module.in_features, quantise)
            else:
                total += tensor.numel() * (dtype.itemsize if tensor.is_floating_point() else tensor.itemsize)
    return total


def _linear_width(block: nn.Module) -> int:
    """Inputs and outputs of all linear layers; a matrix kept outside of one counts like one."""
    return sum(sum(parameter.shape[-2:]) for parameter in block.parameters() if parameter.dim() >= 2)


def _available(meminfo: Path) -> int | None:
    """What the kernel believes can be taken without swapping."""
    if not meminfo.is_file():
        return None
    for line in meminfo.read_text().splitlines():
        key, _, rest = line.partition(":")
        if key == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None


def _free_in_group(membership: Path, root: Path) -> int | None:
    """What the control groups of this process (version 2 or 1, and all groups above) leave; ``None`` without a limit."""
    if not membership.is_file():
        return None
    found = []
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = top / path.lstrip("/")
        # Inside a container the path may be the host's and not exist: its files then lie at the top.
        for place in [top, *(place for place in (group, *group.parents) if place.is_relative_to(top) and place != top)]:
            left = _left(place, *names)
            if left is not None:
                found.append(left)
    return min(found) if found else None


def _left(group: Path, limit_name: str, usage_name: str, cache_key: str) -> int | None:
    """Limit minus usage of one group, file cache that can be dropped not counted."""
    try:
        limit = (group / limit_name).read_text().strip()
        usage = int((group / usage_name).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max" or int(limit) >= 1 << 60:
        return None
    return max(0, int(limit) - usage + int(statistics.get(cache_key, "0")))


def _gib(count: int) -> str:
    return f"{count / GIB:.2f}" if count >= GIB // 10 else f"{count / GIB:.2g}"  # a small model takes more than 0.00
