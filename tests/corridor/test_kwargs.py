"""Named, differentiable kwargs through ``model.body``, against the library's blocks run here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from swarmtune import Kwarg
from swarmtune.errors import KwargError
from tests.harness import loopback, make_handler, remote

ROWS, TOKENS, HIDDEN, BLOCKS = 4, 6, 48, 4


def local_blocks(path: Path, hidden_BTH: Tensor, mask_BT: Tensor | None = None, prompts: dict[int, Tensor] | None = None) -> Tensor:
    """The library's model with neutral ends, a prompt added at the input of some blocks."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=hidden_BTH.dtype).eval().requires_grad_(False)
    model.transformer.word_embeddings_layernorm = model.transformer.ln_f = torch.nn.Identity()
    for block, prompt in (prompts or {}).items():

        def hook(module: torch.nn.Module, args: tuple[Tensor, ...], prompt: Tensor = prompt) -> tuple[Tensor, ...]:
            tokens = prompt.shape[-2]
            return (torch.cat([args[0][:, :tokens] + prompt, args[0][:, tokens:]], dim=1), *args[1:])

        model.transformer.h[block].register_forward_pre_hook(hook)
    return model.transformer(inputs_embeds=hidden_BTH, attention_mask=mask_BT).last_hidden_state


def hidden(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(ROWS, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=dtype, requires_grad=True)


def test_body_equals_local_blocks_and_passes_the_gradient_of_its_input(bloom: Path) -> None:
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[2, :2] = 0
    mine, theirs = hidden(), hidden()
    with loopback(bloom) as swarm:
        found = remote(bloom, swarm).body(mine, attention_mask=mask)
        expected = local_blocks(bloom, theirs, mask)
        assert torch.equal(found, expected)
        found.square().sum().backward()
        expected.square().sum().backward()
    assert torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize("micro_batch_tokens", [4096, TOKENS], ids=["one-micro-batch", "four-micro-batches"])
def test_a_shared_prompt_of_all_blocks_gets_the_sum_over_blocks_and_micro_batches(bloom: Path, micro_batch_tokens: int) -> None:
    mine = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(1), requires_grad=True)
    theirs = mine.detach().clone().requires_grad_()
    with loopback(bloom, ["0:1", "1:4"], micro_batch_tokens=micro_batch_tokens) as swarm:
        found = remote(bloom, swarm).body(hidden().detach(), kwargs=[Kwarg("prompt", mine)])
        found.square().sum().backward()
    expected = local_blocks(bloom, hidden().detach(), prompts=dict.fromkeys(range(BLOCKS), theirs))
    expected.square().sum().backward()
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert (mine.grad - theirs.grad).norm() <= 1e-6 * theirs.grad.norm()


def test_a_prompt_with_a_batch_axis_is_cut_with_the_rows_even_when_its_length_equals_the_batch(bloom: Path) -> None:
    prompt = torch.randn(ROWS, ROWS, HIDDEN, generator=torch.Generator().manual_seed(2))
    mine, theirs = prompt.clone().requires_grad_(), prompt.clone().requires_grad_()
    with loopback(bloom, micro_batch_tokens=TOKENS) as swarm:
        found = remote(bloom, swarm).body(hidden().detach(), kwargs=[Kwarg("prompt", mine, {"batch": 0}, blocks=2)])
        found.square().sum().backward()
    expected = local_blocks(bloom, hidden().detach(), prompts={2: theirs})
    expected.square().sum().backward()
    assert (mine.grad - theirs.grad).norm() <= 1e-6 * theirs.grad.norm()


def test_param_kwarg_stands_in_for_a_norm_of_one_block(bloom: Path) -> None:
    weight = torch.rand(HIDDEN, generator=torch.Generator().manual_seed(3)) + 0.5
    mine = weight.clone().requires_grad_()
    with loopback(bloom) as swarm:
        found = remote(bloom, swarm).body(hidden().detach(), kwargs=[Kwarg("param.input_layernorm.weight", mine, blocks=3)])
        found.square().sum().backward()
    model = AutoModelForCausalLM.from_pretrained(bloom).eval().requires_grad_(False)
    model.transformer.word_embeddings_layernorm = model.transformer.ln_f = torch.nn.Identity()
    theirs = torch.nn.Parameter(weight.clone())
    model.transformer.h[3].input_layernorm.weight = theirs
    expected = model.transformer(inputs_embeds=hidden().detach()).last_hidden_state
    expected.square().sum().backward()
    assert torch.equal(found, expected)
    assert torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize(
    ("family", "bias_name", "eps", "tolerance"),
    [
        ("gpt2", "mlp.c_proj.bias", 1e-6, 1e-6),  # computes in float64 throughout
        ("bloom", "mlp.dense_4h_to_h.bias", 3e-3, 3e-3),  # the library's softmax rounds to float32, so steps must be large
    ],
)
def test_gradcheck_in_float64_by_input_prompt_and_parameter(
    models: dict[str, Path], family: str, bias_name: str, eps: float, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 2, HIDDEN, dtype=torch.float64, generator=generator, requires_grad=True)
    prompt = torch.randn(1, HIDDEN, dtype=torch.float64, generator=generator, requires_grad=True)
    bias = torch.randn(HIDDEN, dtype=torch.float64, generator=generator, requires_grad=True)
    with loopback(models[family], dtype=torch.float64, micro_batch_tokens=2) as swarm:
        body = remote(models[family], swarm, dtype="float64").body

        def function(x: Tensor, prompt: Tensor, bias: Tensor) -> Tensor:
            output: Tensor = body(x, kwargs=[Kwarg("prompt", prompt, blocks="1:3"), Kwarg(f"param.{bias_name}", bias, blocks=2)])
            return output

        assert torch.autograd.gradcheck(function, (x, prompt, bias), fast_mode=True, eps=eps, atol=tolerance, rtol=tolerance)


def test_a_kwarg_without_gradient_gets_none_and_one_frozen_beside_a_trained_one_stays(bloom: Path) -> None:
    frozen = torch.randn(2, HIDDEN)
    trained = torch.randn(2, HIDDEN, requires_grad=True)
    with loopback(bloom) as swarm:
        output = remote(bloom, swarm).body(hidden().detach(), kwargs=[Kwarg("prompt", frozen, blocks=0), Kwarg("prompt", trained, blocks=2)])
        output.sum().backward()
    assert frozen.grad is None
    assert trained.grad is not None


@pytest.mark.parametrize(
    ("kwarg", "sentence"),
    [
        (lambda: Kwarg("param.no_such.weight", torch.ones(HIDDEN), blocks=0), "no parameter"),
        (lambda: Kwarg("param.input_layernorm.weight", torch.ones(HIDDEN + 1), blocks=0), "has shape"),
        (lambda: Kwarg("gizmo", torch.ones(HIDDEN)), "gizmo"),
        (lambda: Kwarg("prompt", torch.ones(TOKENS + 1, HIDDEN)), "at most 6 tokens"),
        (lambda: Kwarg("prompt", torch.ones(2, HIDDEN), blocks=BLOCKS), "outside the model"),
        (lambda: Kwarg("prompt", torch.ones(2, HIDDEN), blocks="2:9"), "outside the model"),
        (lambda: Kwarg("prompt", torch.ones(3, 2, HIDDEN), {"batch": 0}), "batch axis has length 3"),
        (lambda: Kwarg("prompt", torch.ones(2, HIDDEN), {"batch": 5}), "outside a tensor"),
        (lambda: Kwarg("peft.0123456789abcdef.x", torch.ones(2)), "does not bring"),
        (lambda: Kwarg("position_ids", torch.zeros(ROWS, TOKENS, dtype=torch.long), {"batch": 0}), "takes no position_ids"),
    ],
)
def test_a_kwarg_that_does_not_fit_is_one_clear_error(bloom: Path, kwarg: object, sentence: str) -> None:
    with loopback(bloom) as swarm:
        with pytest.raises(KwargError, match=sentence):
            remote(bloom, swarm).body(hidden(), kwargs=[kwarg()])  # type: ignore[operator]


def test_a_sequence_longer_than_the_server_takes_is_refused_with_both_limits(bloom: Path) -> None:
    handler = make_handler(bloom, "0:4")
    handler._max_sequence = 5
    with loopback(bloom, handlers={"a": handler}) as swarm:
        with pytest.raises(KwargError, match="sequences of at most 5, got 4 x 6"):
            remote(bloom, swarm).body(hidden())


def test_positions_and_packed_sequences_reach_a_model_that_takes_them(models: dict[str, Path]) -> None:
    """Without a cache, as here, the library reads positions that start again as sequences packed into one row."""
    ids = torch.arange(4, 16).view(2, 6)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    local = AutoModelForCausalLM.from_pretrained(models["llama"]).eval()
    with loopback(models["llama"]) as swarm:
        model = remote(models["llama"], swarm)
        assert torch.equal(local(input_ids=ids, position_ids=positions, use_cache=False).logits, model(input_ids=ids, position_ids=positions).logits)
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids, position_ids=positions).logits)
