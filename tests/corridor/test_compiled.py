"""Compiled programs come in the background, are used where a call allows it, and give what eager ones give up to the last digits."""

from __future__ import annotations

import logging
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from servers import compiled, products
from servers.compiled import cannot_compile, shape_class, unloadable
from servers.executor import Busy
from servers.handler import CallHandler
from swarmtune.remote.events import EventKind
from swarmtune.swarm import Swarm
from tests.harness import batch, loopback, lora, remote, same_bits, set_values, step, worst_difference

pytestmark = [
    pytest.mark.skipif(bool(cannot_compile(torch.device("cpu"), torch.float32, "none")), reason="no C++ compiler"),
    pytest.mark.filterwarnings("ignore"),  # torch's compiler has some about torch
]
WAIT_S = 120.0


def handlers(swarm: Swarm) -> list[CallHandler]:
    return list(swarm._transport.handlers.values())  # type: ignore[attr-defined]


@contextmanager
def compiling(path: Path, *spans: str, asked: bool = True, **settings: Any) -> Iterator[tuple[Swarm, torch.nn.Module]]:
    with loopback(path, spans or ("0:4",), compile=asked, **settings) as swarm:
        for handler in handlers(swarm):
            handler._span.compile_in_background()
        model = remote(path, swarm, lora("bloom"))
        set_values([dict(model.adapter.named_parameters())])
        yield swarm, model
        for handler in handlers(swarm):
            assert handler._span.compiler is not None
            handler._span.compiler.close()


def classes(swarm: Swarm) -> list[Any]:
    return [each for handler in handlers(swarm) if handler._span.compiler is not None for each in handler._span.compiler._classes.values()]


def wait_until_ready(swarm: Swarm, count: int) -> None:
    ends_at = time.monotonic() + WAIT_S
    while sum(each.ready for each in classes(swarm)) < count:
        assert not any(each.dead for each in classes(swarm))
        assert time.monotonic() < ends_at, "nothing was compiled"
        time.sleep(0.05)


def wait_until(true: Callable[[], bool]) -> None:
    ends_at = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < ends_at
        time.sleep(0.02)


def results(swarm: Swarm, model: torch.nn.Module, given: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[bool]]:
    """Gradients of a step, and which of its forwards were compiled."""
    ran: list[bool] = []
    chosen = [(handler._span, handler._span._on_program) for handler in handlers(swarm)]
    for span, real in chosen:

        def noted(call: Any, run: Any, real: Any = real) -> Any:
            result = real(call, run)
            ran.append(result.compiled)
            return result

        span._on_program = noted  # type: ignore[method-assign]
    try:
        return step(model, given)[2], ran
    finally:
        for span, _ in chosen:
            del span._on_program


def test_calls_run_compiled_once_that_is_ready_and_give_nearly_the_same(bloom: Path) -> None:
    with compiling(bloom, "0:2", "2:4") as (swarm, model):
        eager, ran = results(swarm, model, batch())
        assert ran == [False, False]
        step(model, batch())
        wait_until_ready(swarm, 2)
        found, ran = results(swarm, model, batch())
        assert ran == [True, True]
        assert 0 < worst_difference(eager, found) < 1e-5
        again, _ = results(swarm, model, batch())
        assert same_bits(found, again)
        assert swarm.traffic().events[EventKind.COMPILED].count == 2, "that last digits are others is said, once for each server"
        for handler in handlers(swarm):  # a lost graph runs forward again, compiled too
            handler.graphs.budget_bytes = 0
        without_graphs, ran = results(swarm, model, batch())
        assert all(ran)
        assert worst_difference(found, without_graphs) < 1e-5
        _, ran = results(swarm, model, batch(rows=3))
        assert not any(ran)
        assert swarm.traffic().retries == 0


def test_compiled_products_go_to_onednn_forward_and_backward(bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On whatever CPU this runs."""
    shapes: list[tuple[int, ...]] = []

    def seen(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shapes.append((*x.shape, weight.shape[1]))
        return onednn(x, weight, bias)

    onednn = products.onednn
    monkeypatch.setattr(products, "faster", lambda: True)
    monkeypatch.setattr(products, "LEAST", 0)
    monkeypatch.setattr(products, "onednn", seen)
    monkeypatch.setattr(products.Products, "uuid", lambda self: secrets.token_bytes(8))  # what torch has compiled before is not used
    with compiling(bloom) as (swarm, model):
        eager, _ = results(swarm, model, batch())
        step(model, batch())
        wait_until_ready(swarm, 1)
        shapes.clear()
        found, ran = results(swarm, model, batch())
        assert ran == [True]
        assert 0 < worst_difference(eager, found) < 1e-5
    assert (40, 48, 192) in shapes, "forward through dense_h_to_4h"
    assert (40, 192, 48) in shapes, "and through dense_4h_to_h, or back through the former"
    assert any(inner == 40 for _, inner, _ in shapes), "gradients of LoRA's matrices sum over the tokens"


def test_a_torch_that_keeps_elsewhere_what_products_need_compiles_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "servers.products", None)
    assert compiled._patches() is None


@pytest.mark.parametrize("asked", [True, False])
def test_a_server_that_does_not_compile_is_told_once(bloom: Path, caplog: pytest.LogCaptureFixture, asked: bool) -> None:
    with caplog.at_level(logging.WARNING, "swarmtune"), loopback(bloom, ["0:4"], compile=asked) as swarm:
        model = remote(bloom, swarm, lora("bloom"))
        for _ in range(2):
            step(model, batch())
    assert caplog.text.count("does not compile its blocks: swarm.compile=auto changes nothing there") == asked


def test_who_does_not_ask_is_served_eagerly(bloom: Path) -> None:
    with compiling(bloom, asked=False) as (swarm, model):
        first = step(model, batch())[2]
        for _ in range(3):
            assert same_bits(first, step(model, batch())[2])
        assert classes(swarm) == []


def test_what_does_not_fit_runs_eagerly_and_is_rehearsed_too(bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another type of the hidden states than was compiled for, as if it were of the same class."""
    monkeypatch.setattr(compiled, "shape_class", lambda call: "all")
    with compiling(bloom) as (swarm, model):
        for _ in range(2):
            step(model, batch())
        wait_until_ready(swarm, 1)
        expected, _ = results(swarm, model, batch())
        _, ran = results(swarm, model, batch(rows=2))
        assert ran == [False]
        wait_until_ready(swarm, 1)
        for rows in (2, 4):
            found, ran = results(swarm, model, batch(rows=rows))
            assert ran == [True]
        assert same_bits(expected, found)


def test_what_cannot_be_compiled_runs_eagerly_for_ever_and_says_so(
    bloom: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no such instruction")

    with compiling(bloom) as (swarm, model):
        monkeypatch.setattr(handlers(swarm)[0]._span.compiler, "_rehearse", broken)
        first = step(model, batch())[2]
        for _ in range(3):
            assert same_bits(first, step(model, batch())[2])
        assert "could not be compiled, so they go on eagerly: no such instruction" in caplog.text


def test_first_values_come_after_what_is_being_compiled_and_hold_nobody_up(bloom: Path) -> None:
    """Compiling saves and restores the global random state, from which first values are drawn."""
    with compiling(bloom) as (swarm, model):
        span = handlers(swarm)[0]._span
        assert span.compiler is not None
        with span.compiler.not_now():
            done = threading.Event()
            asked = threading.Thread(target=lambda: (remote(bloom, swarm, lora("bloom", use_dora=True)), done.set()))
            asked.start()
            began = time.monotonic()
            step(model, batch())
            assert time.monotonic() - began < 2, "others are served meanwhile"
            assert not done.wait(0.5)
        asked.join(WAIT_S)
        assert done.is_set()


def test_nothing_draws_first_values_while_something_is_compiled(bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with compiling(bloom) as (swarm, model):
        compiler, at_it, go_on = handlers(swarm)[0]._span.compiler, threading.Event(), threading.Event()
        assert compiler is not None
        monkeypatch.setattr(compiler, "_rehearse", lambda *given: (at_it.set(), go_on.wait(WAIT_S)))
        for _ in range(2):
            step(model, batch())
        assert at_it.wait(WAIT_S)
        try:
            with pytest.raises(Busy), compiler.not_now():
                pass
        finally:
            go_on.set()
        wait_until_ready(swarm, 1)
        with compiler.not_now():
            pass


@pytest.mark.parametrize("failures", [0, 2, compiled.MAX_UNLOADABLE, compiled.MAX_UNLOADABLE + 1])
def test_a_library_that_cannot_be_loaded_is_made_again(bloom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    library, tries = tmp_path / "x.main.so", []
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def rehearse(*_: Any) -> None:
        tries.append(library.exists())
        if len(tries) <= failures:
            library.touch()
            try:
                raise ImportError(f"{library}: file too short")
            except ImportError as error:
                raise RuntimeError("backend='backend' raised:") from error

    with compiling(bloom) as (swarm, model):
        monkeypatch.setattr(handlers(swarm)[0]._span.compiler, "_rehearse", rehearse)
        for _ in range(2):
            step(model, batch())
        wait_until(lambda: any(each.ready or each.dead for each in classes(swarm)))
        assert len(tries) == min(failures, compiled.MAX_UNLOADABLE) + 1
        assert not any(tries), "the broken one had been removed"
        assert [each.ready for each in classes(swarm)] == [failures <= compiled.MAX_UNLOADABLE]


def test_a_library_of_others_is_never_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = tmp_path / "own", tmp_path / "libtorch.so"
    own.mkdir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(own))
    assert unloadable(ImportError(f"{own}/a/b.so: undefined symbol: f")) == own / "a" / "b.so"
    for broken in (other, own / ".." / "libtorch.so"):
        assert unloadable(ImportError(f"{broken}: undefined symbol: f")) is None
    assert unloadable(RuntimeError(f"{own}/a/b.so: f")) is None
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert unloadable(ImportError(f"{own}/a/b.so: undefined symbol: f")) is None


@pytest.mark.parametrize(
    ("cxx", "there", "found"),
    [
        (None, {"g++", "clang++"}, "g++"),
        ("", {"clang++"}, "clang++"),
        ("/opt/bin/g++-13", {"/opt/bin/g++-13", "g++"}, "/opt/bin/g++-13"),
        ("aarch64-linux-gnu-g++", {"aarch64-linux-gnu-g++", "g++"}, "aarch64-linux-gnu-g++"),
        ("icpx", {"g++"}, "g++"),
        ("gcc", {"gcc", "g++"}, "g++"),
        ("/usr/bin/x86_64-linux-gnu-gcc-12", {"/usr/bin/x86_64-linux-gnu-gcc-12"}, None),
        ("clang", {"clang", "clang++"}, "clang++"),
        ("cc", {"cc"}, None),
    ],
)
def test_the_compiler_is_one_of_cpp(cxx: str | None, there: set[str], found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    if cxx is not None:
        monkeypatch.setenv("CXX", cxx)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    monkeypatch.setattr(sys, "platform", "linux")
    assert compiled.cpp_compiler() == found


def test_clang_goes_first_where_torch_expects_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert compiled.cpp_compiler() == "clang++"


def test_a_torch_without_these_settings_compiles_as_it_does_by_itself(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delattr("torch._inductor.codecache._HEADER_DIR")
    with caplog.at_level(logging.INFO, "servers"):
        compiled.prepare_compiler()
    assert "as this torch does by itself" in caplog.text


def test_who_was_refused_beside_a_compilation_comes_before_the_next_one(bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks twice a second, and compilations follow each other at once."""
    with compiling(bloom) as (swarm, model):
        compiler = handlers(swarm)[0]._span.compiler
        assert compiler is not None
        monkeypatch.setattr(compiler, "_rehearse", lambda *_: time.sleep(1.0))
        for rows in range(1, 9):
            for _ in range(2):
                step(model, batch(rows=rows))
        began = time.monotonic()
        remote(bloom, swarm, lora("bloom", use_dora=True))
        assert time.monotonic() - began < 4
        assert sum(each.ready for each in classes(swarm)) < 8, "the others are still to come"


def test_beside_a_compilation_everything_runs_eagerly(bloom: Path) -> None:
    with compiling(bloom) as (swarm, model):
        for _ in range(2):
            step(model, batch())
        wait_until_ready(swarm, 1)
        compiler = handlers(swarm)[0]._span.compiler
        assert compiler is not None
        step(model, batch())
        changes = swarm.traffic().events[EventKind.COMPILED].count
        with compiler.not_now():
            assert results(swarm, model, batch())[1] == [False]
        assert results(swarm, model, batch())[1] == [True]
        assert ["runs compiled" in event.detail for event in swarm.events() if event.kind is EventKind.COMPILED][changes:] == [False, True]


def test_a_class_that_nobody_uses_makes_room(bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MAX_CLASSES", 1)
    monkeypatch.setattr(compiled, "IDLE_S", 0.0)
    with compiling(bloom) as (swarm, model):
        monkeypatch.setattr(handlers(swarm)[0]._span.compiler, "_rehearse", lambda *_: None)
        for rows in (1, 2):
            for _ in range(2):
                step(model, batch(rows=rows))
            wait_until(lambda: sum(each.ready for each in classes(swarm)) == 1)
        assert [each.program is not None for each in classes(swarm)] == [False, True]
        for _ in range(2):  # used again, it begins anew
            step(model, batch(rows=1))
        wait_until(lambda: sorted(each.ready for each in classes(swarm)) == [False, True])
        assert [each.program is not None for each in classes(swarm)] == [False, True]
        assert next(reversed(classes(swarm))).seen == 2


def test_classes_are_bounded(bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MAX_CLASSES", 1)
    monkeypatch.setattr(compiled, "MAX_REMEMBERED", 3)
    with compiling(bloom) as (swarm, model):
        monkeypatch.setattr(handlers(swarm)[0]._span.compiler, "_rehearse", lambda *_: None)
        for rows in (1, 2, 3, 4, 1, 2, 3, 4):
            for _ in range(2):
                step(model, batch(rows=rows))
        assert len(classes(swarm)) <= 3
        assert sum(each.program is not None for each in classes(swarm)) == 1


def test_what_cannot_run_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert "int8" in cannot_compile(cpu, torch.float32, "int8")
    assert "float16" in cannot_compile(cpu, torch.float16, "none")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "no C++ compiler" in cannot_compile(cpu, torch.float32, "none")
    assert cannot_compile(torch.device("cuda"), torch.float32, "none") == ""


def test_dropout_and_prefixes_are_not_compiled(bloom: Path) -> None:
    seen = []
    with compiling(bloom) as (swarm, _):
        model = remote(bloom, swarm, lora("bloom", lora_dropout=0.5)).train()
        span = handlers(swarm)[0]._span
        real = span._on_program
        span._on_program = lambda call, run: (seen.append(shape_class(call)), real(call, run))[1]  # type: ignore[method-assign]
        step(model, batch())
    assert seen == [None]
