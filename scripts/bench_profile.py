"""``scripts/bench profile``: what a server's device does in a training step of its blocks, by torch operation, eager and compiled.

The upper half of the reference model in this process: a forward whose graph is kept, and the backward through it, as a server runs them.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from bench_model import lora, reference_model, spans_of, thread_budget, token_ids
from bench_place import complete
from bench_report import Panel, Report, Row, setting
from torch.profiler import ProfilerActivity, profile

from servers.compiled import cannot_compile
from servers.span import Span
from swarmtune.errors import SwarmError
from swarmtune.wire.kept import KeptCall
from swarmtune.wire.messages import SpanCall, SpanResult
from tests.harness import loopback, remote

WAIT_S = 300.0
CLIENT = "bench"
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_mkl_linear", "mkldnn", "linear", "_linear_pointwise", "product")
"""Ends of the names of matrix products."""
COMPILED = ("CompiledFunction", "CompiledFxGraph", "Torch-Compiled", "cpp_fused")
"""Parts of the names under which compiled code appears: what has been fused."""
TOP = 6
"""Operations named one by one."""


def measure(options: argparse.Namespace, directory: Path) -> Report:
    """Both, one after the other."""
    complete(options)
    path = reference_model(options.hidden, options.layers, directory / "model")
    dtype = getattr(torch, options.dtype)
    with thread_budget(options), loopback(path, spans_of(options.layers, 2), dtype=dtype) as swarm:
        span: Span = list(swarm._transport.handlers.values())[-1]._span  # type: ignore[attr-defined]
        call = recorded(span, lambda: remote(path, swarm, lora())(input_ids=(ids := token_ids(options.rows, options.sequence)), labels=ids))
        rows, bars = profiled(span, call, "eager", options)
        if not (why := cannot_compile(torch.device("cpu"), dtype, "none")):
            span.compile_in_background()
            call = replace(call, compile=True)
            wait_until_compiled(span, call)
            more, compiled_bars = profiled(span, call, "compiled", options)
            rows, bars = [*rows, *more], bars | compiled_bars
        else:
            rows.append({"figure": "compiled", "value": f"not measured: {why}"})
    name = "_".join(["bench_profile", *([] if options.dtype == "float32" else [options.dtype])])
    says = f"blocks {call.span}, {options.rows} x {options.sequence} tokens, {options.threads} threads"
    return Report("profile", name, setting(options, says), rows, [Panel("milliseconds of a step's forward and backward", bars=bars)])


def recorded(span: Span, run: object) -> SpanCall:
    """The forward that a client's training asks for."""
    calls: list[SpanCall] = []
    forward = span.forward

    def noted(call: SpanCall, client: str = "") -> SpanResult:
        calls.append(call)
        return forward(call, client)

    span.forward = noted  # type: ignore[method-assign]
    try:
        run()  # type: ignore[operator]
    finally:
        del span.forward
    return calls[-1]


def step(span: Span, call: SpanCall) -> bool:
    """Forward and backward; whether compiled code ran."""
    result = span.forward(call, CLIENT)
    assert result.hidden_BTH is not None, "a forward gives one"
    span.kept_backward(KeptCall(call.span, call.model, result.handle, torch.full_like(result.hidden_BTH, 1e-3), call.input_grad, 60_000), CLIENT)
    return result.compiled


def wait_until_compiled(span: Span, call: SpanCall) -> None:
    """Take steps until they run compiled code.

    Raises:
        SwarmError: that does not come.
    """
    ends_at = time.monotonic() + WAIT_S
    while not step(span, call):
        if time.monotonic() > ends_at:
            raise SwarmError(f"nothing was compiled within {WAIT_S:.0f} s")
        time.sleep(1.0)


def profiled(span: Span, call: SpanCall, how: str, options: argparse.Namespace) -> tuple[list[Row], dict[str, float]]:
    """Milliseconds of a step without the profiler, and their shares by operation with it."""
    step(span, call)
    times = []
    for _ in range(options.rounds):
        began = time.perf_counter()
        step(span, call)
        times.append(1e3 * (time.perf_counter() - began))
    step_ms = sorted(times)[len(times) // 2]
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(options.steps):
            step(span, call)
    own: Counter[str] = Counter()
    for event in found.key_averages():
        own[event.key] += event.self_cpu_time_total
    total = sum(own.values())
    kinds: Counter[str] = Counter()
    for name, spent in own.items():
        plain = name.removeprefix("aten::")
        kind = "fused" if any(part in name for part in COMPILED) else "matrix products" if plain.endswith(PRODUCTS) else "everything else"
        kinds[kind] += spent
    rows: list[Row] = [{"figure": f"{how}: forward and backward, ms", "value": round(step_ms, 1)}]
    rows += [{"figure": f"{how}: {kind}, share", "value": f"{100 * spent / total:.1f} %"} for kind, spent in kinds.most_common()]
    rows += [{"figure": f"{how}: {name}", "value": f"{100 * spent / total:.1f} %"} for name, spent in own.most_common(TOP)]
    return rows, {f"{how}: {kind}": step_ms * spent / total for kind, spent in kinds.most_common()}
