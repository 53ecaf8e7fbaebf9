"""What servers keep between calls: handles that mean nothing to others, bounds that hold whoever fills them, nothing left of who has gone."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from servers import gradients as results
from servers import stored
from servers.executor import Executor
from servers.gradients import Graph, gradients, to_host
from servers.graphs import Graphs, Tape, expire_forever
from servers.mailbox import Mailbox
from servers.span import Span
from servers.stored import StoredTensors
from servers.sums import MAX_PASSES, NoRoom, Sums
from swarmtune.types import BlockSpan
from swarmtune.wire.messages import GradientSum
from swarmtune.wire.relay import Delivery, Receive, new_token
from tests.harness import make_handler

SPAN = BlockSpan(0, 2)


def graph() -> Graph:
    return Graph(torch.ones(1, 1, 1), None, [], {})


def test_a_handle_of_one_process_is_none_of_another() -> None:
    first, second = Graphs(1 << 20, 60.0), Graphs(1 << 20, 60.0)
    handles = {first.keep("client", graph()) for _ in range(100)} | {second.keep("client", graph()) for _ in range(100)}
    assert len(handles) == 200
    assert all(0 < handle < 1 << 53 for handle in handles)


def test_what_was_saved_and_then_changed_in_place_is_an_error_as_without_hooks() -> None:
    def changed(recording: bool) -> None:
        weight = torch.ones(3, requires_grad=True)
        middle = torch.ones(3) * 1
        with Tape(1 << 20, frozenset()).recording() if recording else torch.enable_grad():
            result = (weight * middle).sum()
        middle.mul_(100)
        torch.autograd.grad(result, weight)

    with pytest.raises(RuntimeError, match="inplace"):
        changed(recording=False)
    with pytest.raises(RuntimeError, match="in place"):
        changed(recording=True)


def held(sums: Sums) -> int:
    return sum(len(own) for own in sums._held.values())


def test_passes_that_do_not_fit_leave_nothing_behind() -> None:
    sums = Sums(budget_bytes=100)
    for ticket in range(10 * MAX_PASSES):
        with pytest.raises(NoRoom):
            sums.add("client", SPAN, GradientSum(ticket, 0, 3), {0: torch.ones(20)})  # twice 80 bytes would have to be held
    assert (held(sums), sums.held_bytes) == (0, 0)
    assert sums.add("client", SPAN, GradientSum(1, 0, 2), {0: torch.ones(20)}) is None
    total = sums.add("client", SPAN, GradientSum(1, 1, 2), {0: torch.ones(20)})
    assert total is not None
    assert torch.equal(total[0], torch.full((20,), 2.0))
    assert sums.held_bytes == 0


def test_half_a_sum_is_let_go_in_time_also_while_nobody_calls() -> None:
    async def wait() -> None:
        expiring = asyncio.create_task(expire_forever(Graphs(0, 60.0), sums))
        async with asyncio.timeout(10):
            while sums.held_bytes:
                await asyncio.sleep(0.02)
        expiring.cancel()

    sums = Sums()
    sums.ttl_s = 0.2
    sums.add("client", SPAN, GradientSum(1, 0, 2), {0: torch.ones(20)})
    asyncio.run(wait())
    assert held(sums) == 0


def test_who_brings_many_small_tensors_loses_them_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "MAX_STORED", 100)
    kept = StoredTensors()
    kept.put("honest", {f"h{number}": torch.ones(1000) for number in range(50)})
    for start in range(0, 1000, 100):
        kept.put("greedy", {f"g{number}": torch.ones(1) for number in range(start, start + 100)})
    assert len(kept) == 100
    assert len(kept.get("honest", [f"h{number}" for number in range(50)])) == 50


def test_what_is_sent_again_counts_as_new() -> None:
    kept = StoredTensors(budget_bytes=8)
    for digest in ("a", "b", "a", "c"):
        kept.put("client", {digest: torch.ones(1)})
    assert set(kept.get("client", ["a", "b", "c"])) == {"a", "c"}


def test_a_delivery_that_comes_again_has_been_taken() -> None:
    async def twice() -> tuple[bool, bool, Tensor]:
        mailbox, token = Mailbox(), new_token()
        receiving = asyncio.create_task(mailbox.receive("client", Receive(token, "server", 4), 5.0))
        first = await mailbox.deliver("server", Delivery(token, torch.ones(1)))
        tensor = await receiving
        began = time.monotonic()
        second = await mailbox.deliver("client", Delivery(token, torch.ones(1)))
        assert time.monotonic() - began < 1
        return first, second, tensor

    first, second, tensor = asyncio.run(twice())
    assert (first, second, tensor.item()) == (True, True, 1.0)


def test_the_worker_does_what_is_to_follow_the_job_that_runs() -> None:
    order: list[str] = []
    running, go_on = threading.Event(), threading.Event()

    def job() -> None:
        running.set()
        go_on.wait(10)
        order.append("job")

    async def submit(executor: Executor) -> None:
        executor.after_this(lambda: order.append("never"))  # nothing runs
        first = asyncio.create_task(executor.submit(job, priority=0, timeout_s=10))
        await asyncio.to_thread(running.wait, 10)
        executor.after_this(lambda: order.append("after"))
        go_on.set()
        await first
        await executor.submit(lambda: order.append("next"), priority=0, timeout_s=10)

    executor = Executor().start()
    asyncio.run(submit(executor))
    executor.close()
    assert order == ["job", "after", "next"]


def test_a_float16_gradient_is_tried_unscaled_before_it_is_given_up() -> None:
    weight = torch.tensor([1e-3], dtype=torch.float16, requires_grad=True)
    large = [torch.tensor(2.0**power, dtype=torch.float16) for power in (15, 12)]
    output = (weight * large[0]).view(1, 1, 1) * large[1]  # on the way back, whatever is scaled up overflows
    found = gradients(Graph(output, None, [(0, 0, weight)], {0: (BlockSpan(0, 1), torch.float32, True)}), torch.tensor([[[1e-7]]]), False)
    assert found.kwarg_grads[0].item() == pytest.approx(1e-7 * 2**27, rel=0.3)


def test_what_a_server_is_to_keep_is_what_it_keeps(bloom: Path) -> None:
    """An empty store is false, which must not make it the usual one."""
    made = make_handler(bloom, "0:2")._span
    graphs = Graphs(0, 1.5)
    assert Span(made.config, made.site, made.span, made.weights, made.dtype, made.device, graphs).graphs is graphs


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("pinned_bytes", [0, results.PINNED_BYTES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_reach_the_host_in_the_type_in_which_they_travel(
    device: str, pinned_bytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "PINNED_BYTES", pinned_bytes)
    tensor = torch.randn(5, 3, device=device).t()
    found = to_host(tensor, dtype)
    assert (found.device.type, found.dtype) == ("cpu", dtype)
    assert torch.equal(found, tensor.to("cpu", dtype))
    assert found.is_pinned() == (device == "cuda" and pinned_bytes > 0)
