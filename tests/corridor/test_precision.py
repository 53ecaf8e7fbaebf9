"""Bodies in half precision under adapters in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swarmtune.errors import NonFinite
from swarmtune.types import Kwarg
from tests.adapter_cases import CASES
from tests.harness import batch, local_peft, loopback, lora, remote, same_bits, set_values, step, trainable, worst_difference

HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_fresh_adapter_over_a_half_body_gives_the_logits_of_a_fresh_local_one(bloom: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    local = local_peft(bloom, lora("bloom", init_lora_weights=False), dtype)
    with loopback(bloom, dtype=dtype) as swarm:
        torch.manual_seed(3)
        model = remote(bloom, swarm, lora("bloom", init_lora_weights=False))
        assert same_bits(trainable(local), dict(model.adapter.named_parameters()))
        assert torch.equal(local(**batch()).logits, model(**batch()).logits)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-12])
def test_gradients_through_a_float16_body_do_not_vanish_however_small_the_loss(bloom: Path, scale: float) -> None:
    with loopback(bloom, dtype=torch.float16) as swarm:
        model = remote(bloom, swarm, lora("bloom"), dtype="float32")
        set_values([dict(model.adapter.named_parameters())])
        _, _, whole = step(model, batch())
        model.zero_grad()
        (model(**batch()).loss * scale).backward()
        small = {name: parameter.grad / scale for name, parameter in model.adapter.named_parameters()}
    assert worst_difference(whole, small) <= 2e-3
    assert all(grad.norm() > 0 for grad in small.values())


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_a_float16_body_takes_scaled_losses(bloom: Path, scale: float) -> None:
    with loopback(bloom, dtype=torch.float16) as swarm:
        model = remote(bloom, swarm, lora("bloom"), dtype="float32")
        set_values([dict(model.adapter.named_parameters())])
        _, _, whole = step(model, batch())
        model.zero_grad()
        (model(**batch()).loss * scale).backward()
        large = {name: parameter.grad / scale for name, parameter in model.adapter.named_parameters()}
    assert worst_difference(whole, large) <= 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_adapters_and_their_gradients_are_float32_over_any_body(bloom: Path, dtype: torch.dtype) -> None:
    with loopback(bloom, dtype=dtype) as swarm:
        model = remote(bloom, swarm, lora("bloom"))
        set_values([dict(model.adapter.named_parameters())])
        _, _, grads = step(model, batch())
    assert {parameter.dtype for parameter in model.adapter.parameters()} == {torch.float32}
    assert {grad.dtype for grad in grads.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "name", ["ln_tuning", "lora and a whole norm", "lora with all biases", "lora on stem and head", "adalora", "trainable tokens"]
)
def test_copies_of_norms_and_biases_learn_in_float32_over_half_bodies_and_reload_as_they_are(
    bloom: Path, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    with loopback(bloom, dtype=dtype) as swarm:
        model = remote(bloom, swarm, CASES[name].config("bloom")).train()
        assert {parameter.dtype for parameter in model.adapter.parameters()} == {torch.float32}
        assert not any("ranknum" in key for key, _ in model.adapter.named_parameters())
        optimizer = torch.optim.AdamW(model.adapter.parameters(), lr=1e-2)
        losses = []
        for number in range(4):
            loss = model(**batch()).loss
            loss.backward()
            optimizer.step()
            model.adapter.after_step(number)
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        model.eval().adapter.save_pretrained(tmp_path / "adapter")
        again = remote(bloom, swarm, str(tmp_path / "adapter"))
        assert torch.allclose(model(**batch()).logits, again(**batch()).logits, atol=0 if name != "adalora" else 1e-2)


def test_a_forward_that_overflows_float16_names_the_block(bloom: Path) -> None:
    with loopback(bloom, dtype=torch.float16) as swarm:
        model = remote(bloom, swarm)
        hidden = torch.randn(1, 4, 48)
        bias = torch.full((48,), 6e4)
        with pytest.raises(NonFinite, match="block 2") as caught:
            model.body(
                hidden, kwargs=[Kwarg("param.mlp.dense_4h_to_h.bias", bias, blocks=2), Kwarg("param.self_attention.dense.bias", bias, blocks=2)]
            )
    assert caught.value.block == 2
