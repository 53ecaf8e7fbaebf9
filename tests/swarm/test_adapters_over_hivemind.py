"""A sample of adapters over real servers and real hivemind: each way that tensors travel, and a failure with dropout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import swarmtune
from servers.__main__ import pick_device
from tests.adapter_cases import CASES
from tests.corridor.test_adapters import inputs, local, near, perturb
from tests.harness import batch, lora, on_device, remote, same_bits, step, trainable

pytestmark = [
    pytest.mark.swarm,
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),  # PEFT's BOFT, on every machine without a compiler
]
DEVICE = pick_device("auto")
"""Where the servers compute that are not told."""
SAMPLE = (
    "lora",
    "dora",
    "lora with biases",
    "lora and a whole norm",
    "ia3",
    "boft",
    "deft",
    "psoft",
    "vblora",
    "vera",
    "prompt tuning",
    "prefix tuning",
)


@pytest.fixture(scope="module")
def three(bloom: Path) -> Iterator[swarmtune.LocalSwarm]:
    """Three spans, the first one twice."""
    with swarmtune.LocalSwarm(bloom, ["0:1", "1:3", "3:4", "0:1"], dtype="float32") as servers:
        yield servers


@pytest.fixture(scope="module")
def servers(models: dict[str, Path], three: swarmtune.LocalSwarm) -> Iterator[dict[str, list[str]]]:
    """Addresses by family."""
    with swarmtune.LocalSwarm(models["llama"], ["0:2", "2:4"], dtype="float32") as llama:
        yield {"bloom": three.initial_peers, "llama": llama.initial_peers}


@pytest.mark.parametrize(
    ("name", "family"), [(name, "bloom") for name in SAMPLE] + [(name, "llama") for name in ("lora", "prefix tuning", "adaption prompt")]
)
def test_fresh_logits_loss_and_every_gradient_equal_peft(models: dict[str, Path], servers: dict[str, list[str]], name: str, family: str) -> None:
    case = CASES[name]
    expected = local(models[family], case.config(family)).to(DEVICE)
    with swarmtune.connect(servers[family]) as swarm:
        torch.manual_seed(7)
        model = remote(models[family], swarm, case.config(family), device=DEVICE)
        padded = on_device(DEVICE, inputs(case, padding="left"))
        assert near(expected(**padded).logits, model(**padded).logits, case.logits)
        perturb(trainable(expected), dict(model.adapter.named_parameters()))
        here, there = step(expected, padded), step(model, padded)
    assert near(here[0], there[0], case.logits)
    for key, grad in here[2].items():
        assert near(grad, there[2][key], case.tolerance), key


def test_lora_deep_prompts_and_a_head_train_together_over_four_micro_batches(bloom: Path, three: swarmtune.LocalSwarm, tmp_path: Path) -> None:
    parts = [lora("bloom"), swarmtune.DeepPromptConfig(num_tokens=3), swarmtune.HeadConfig()]
    with swarmtune.connect(three.initial_peers, micro_batch_tokens=13) as swarm:
        torch.manual_seed(1)
        model = remote(bloom, swarm, parts)
        optimizer = torch.optim.AdamW(model.adapter.parameters(), lr=1e-2)
        losses = []
        for _ in range(4):
            loss = model(**batch(padding="right")).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        model.adapter.save_pretrained(tmp_path / "adapter")
        again = remote(bloom, swarm, str(tmp_path / "adapter"))
        assert torch.equal(model(**batch()).logits, again(**batch()).logits)


def test_a_step_with_dropout_is_bitwise_the_quiet_one_when_a_server_is_killed_between_forward_and_backward(
    bloom: Path, three: swarmtune.LocalSwarm
) -> None:
    with swarmtune.connect(three.initial_peers) as swarm:
        torch.manual_seed(1)
        model = remote(bloom, swarm, lora("bloom", lora_dropout=0.3)).train()
        perturb(dict(model.adapter.named_parameters()))
        torch.manual_seed(2)
        quiet = step(model, batch())
        torch.manual_seed(2)
        model.zero_grad()
        loss = model(**batch()).loss
        running = dict(next(iter(swarm._models.values())).chain.caller.running)
        used = next(server for server in three.servers if server.peer_id == running[0, 0].peer)  # the one that has run it, not one that would now
        before = swarm.traffic().calls
        used.kill()
        loss.backward()
        assert torch.equal(loss, quiet[1])
        assert same_bits(quiet[2], {name: parameter.grad for name, parameter in model.adapter.named_parameters()})
        # A death that is noticed before anything is asked of the dead costs a forward again, and no failed call.
        assert swarm.traffic().retries >= 1 or swarm.traffic().calls - before > len(running)
        torch.manual_seed(3)
        assert not torch.equal(model(**batch()).loss, loss), "another seed drops other elements"
    used.restart()
