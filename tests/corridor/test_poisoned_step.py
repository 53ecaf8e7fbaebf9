"""A backward that cannot be completed leaves every gradient as it was, also of what learns behind the body."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from swarmtune.errors import BlocksUnserved, SwarmError
from tests.harness import batch, loopback, lora, make_handler, remote, same_bits, set_values

HEAD = {"target_modules": ["q_proj", "lm_head"]}
"""What is on the head has its gradient before the body is asked."""


def grads_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.adapter.named_parameters() if parameter.grad is not None}


@pytest.fixture
def llama(models: dict[str, Path]) -> Path:
    return models["llama"]


def test_a_failed_backward_leaves_no_gradients(llama: Path) -> None:
    with loopback(llama, patience_s=0.3) as swarm:
        model = remote(llama, swarm, lora("llama", **HEAD))
        set_values([dict(model.adapter.named_parameters())])
        loss = model(**batch()).loss
        swarm.loop.run(swarm._transport.close())  # type: ignore[attr-defined]
        with pytest.raises(BlocksUnserved):
            loss.backward()
        assert grads_of(model) == {}


@pytest.mark.parametrize("scaled", [False, True])
def test_accumulated_gradients_are_those_from_before_and_a_retry_adds_up(llama: Path, scaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarmtune.remote.route.FIRST_BAN_S", 0.0)
    handlers = {"a": make_handler(llama, "0:4")}
    with loopback(llama, handlers=handlers, patience_s=0.3) as swarm:
        transport = swarm._transport
        model = remote(llama, swarm, lora("llama", **HEAD))
        set_values([dict(model.adapter.named_parameters())])

        def backward(seed: int, broken: bool = False) -> None:
            output = model(**batch(seed=seed))
            if broken:
                swarm.loop.run(transport.kill("a"))  # type: ignore[attr-defined]
            (output.loss * 1024 if scaled else output.logits.square().mean()).backward()

        backward(1)
        backward(2)
        expected, first = grads_of(model), None
        model.zero_grad()
        backward(1)
        first = grads_of(model)
        with pytest.raises(SwarmError):
            backward(2, broken=True)
        assert same_bits(first, grads_of(model))
        assert first.keys() == expected.keys()
        transport.handlers["a"] = handlers["a"]  # type: ignore[attr-defined]
        backward(2)
        assert same_bits(expected, grads_of(model))


def test_two_bodies_in_one_backward_are_both_undone(llama: Path) -> None:
    """The second call's part may be done when the first one's fails."""
    with loopback(llama, patience_s=0.3) as swarm:
        model = remote(llama, swarm, lora("llama", **HEAD))
        set_values([dict(model.adapter.named_parameters())])
        first, second = model(**batch(seed=1)), model(**batch(seed=2))
        chain = model.body._chain
        done, real = [], chain.backward

        async def once(*arguments: Any) -> Any:
            if done:
                raise SwarmError("the swarm is gone")
            done.append(1)
            return await real(*arguments)

        chain.backward = once
        with pytest.raises(SwarmError, match="the swarm is gone"):
            (first.loss + second.loss).backward()
        assert done
        assert grads_of(model) == {}


def test_an_interrupt_in_a_backward_restores_too(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with loopback(llama) as swarm:
        model = remote(llama, swarm, lora("llama", **HEAD))
        set_values([dict(model.adapter.named_parameters())])
        loss = model(**batch()).loss

        def interrupted(coroutine: Any) -> Any:
            coroutine.close()
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(swarm.loop, "run", interrupted)
            with pytest.raises(KeyboardInterrupt):
                loss.backward()
        assert grads_of(model) == {}
