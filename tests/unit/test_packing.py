"""Packed rows: planned within their length, exact where a model can keep sequences apart, refused where it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    PretrainedConfig,
    Qwen2Config,
)

from swarmtune.errors import UsageError
from swarmtune.train.examples import Example, pad
from swarmtune.train.module import CausalLMModule
from swarmtune.train.packing import choose_packing, fill_rows, pack_rows, plan_rows, real_tokens, why_not
from tests.harness import VOCABULARY, loopback, lora, remote, set_values, step, tiny_config, trainable

LENGTH = 40


def example(size: int, seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    learned = torch.rand(size, generator=generator) < 0.6
    learned[-1] = True
    return Example(torch.randint(4, VOCABULARY, (size,), generator=generator).tolist(), learned.tolist())


EXAMPLES = [example(size, seed) for seed, size in enumerate((13, 9, 17, 5, 21, 30, 2, 8))]


@given(st.lists(st.integers(2, 50), max_size=60), st.integers(50, 90))
def test_a_plan_holds_every_sequence_once_and_wastes_little(sizes: list[int], length: int) -> None:
    rows = plan_rows(sizes, length)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    filled = [sum(sizes[index] for index in row) for row in rows]
    assert all(total <= length for total in filled)
    assert sum(total <= length / 2 for total in filled) <= 1, "two rows that are half empty would be one"
    assert rows == sorted(rows)
    streamed = list(fill_rows([Example([0] * size, [True] * size) for size in sizes], length))
    assert [len(item) for row in streamed for item in row] == sizes
    assert all(sum(map(len, row)) <= length for row in streamed)


@given(st.lists(st.integers(2, 20), min_size=1, max_size=12))
def test_tokens_that_fill_rows_are_not_counted(sizes: list[int]) -> None:
    examples = [example(size, seed) for seed, size in enumerate(sizes)]
    rows = list(fill_rows(examples, 20))
    assert real_tokens(pack_rows(rows, 20, 0)) == real_tokens(pad(examples, 0)) == sum(sizes)


def model_of(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 3}
ROTARY: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**COMMON, num_key_value_heads=2, intermediate_size=48),
    "qwen2": Qwen2Config(**COMMON, num_key_value_heads=2, intermediate_size=48),
    "mistral, sliding window": MistralConfig(**COMMON, num_key_value_heads=2, intermediate_size=48, sliding_window=4),
    "gemma2": Gemma2Config(**COMMON, num_key_value_heads=2, intermediate_size=48, head_dim=8),
    "gpt_neox": GPTNeoXConfig(**COMMON, intermediate_size=48),
}
OTHERS: dict[str, PretrainedConfig] = {
    "bloom": tiny_config("bloom", 2),
    "falcon with alibi": FalconConfig(**COMMON, alibi=True, new_decoder_architecture=False),
    "mpt": MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=VOCABULARY),
}


@pytest.mark.parametrize("family", ROTARY)
def test_the_packed_loss_is_the_mean_of_the_separate_ones_by_learned_tokens(family: str) -> None:
    model = model_of(ROTARY[family])
    assert why_not(model) is None
    rows = list(fill_rows(EXAMPLES, LENGTH))
    assert len(rows) < len(EXAMPLES)
    with torch.no_grad():
        packed = float(model(**pack_rows(rows, LENGTH, 3), use_cache=False).loss)
        total = tokens = 0.0
        for item in EXAMPLES:
            learned = sum(item.learned[1:])
            total, tokens = total + float(model(**pad([item], 3)).loss) * learned, tokens + learned
        joined = pack_rows(rows, LENGTH, 3)
        joined["position_ids"] = torch.arange(LENGTH).expand(len(rows), -1)
        assert packed == pytest.approx(total / tokens, rel=2e-6)
        assert abs(float(model(**joined, use_cache=False).loss) - packed) > 1e-4, "the comparison must be able to fail"


@pytest.mark.parametrize("family", OTHERS)
def test_a_model_that_cannot_keep_sequences_apart_is_refused_or_padded(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of(OTHERS[family])
    with pytest.raises(UsageError, match=r"^data.packing=always is not possible: .*; with data.packing=auto each conversation has a row of its own$"):
        choose_packing("always", model)
    said: list[str] = []
    assert choose_packing("auto", model, said.append) == "never"
    assert said[0].startswith("conversations are not packed, each has a row of its own: ")
    assert choose_packing("never", model) == "never"
    with pytest.raises(UsageError, match=r"data\.packing=always is not possible"):
        CausalLMModule(model)(**pack_rows([EXAMPLES[:2]], LENGTH, 3))


def test_packing_is_measured_and_leaves_the_model_as_it_was() -> None:
    model = model_of(ROTARY["llama"]).train()
    state = torch.get_rng_state()
    assert choose_packing("auto", model) == "always"
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    ignoring = model_of(ROTARY["llama"])
    forward = ignoring.forward

    def forgetful(input_ids: Any, position_ids: Any = None, **rest: Any) -> Any:
        return forward(input_ids=input_ids, **rest)

    ignoring.forward = forgetful
    assert "sees what stands before it" in str(why_not(ignoring))


def test_packed_rows_over_remote_blocks_give_the_separate_losses_and_gradients(models: dict[str, Path]) -> None:
    with loopback(models["llama"], micro_batch_tokens=LENGTH) as swarm:
        model = remote(models["llama"], swarm, lora("llama"))
        set_values([trainable(model)])
        assert why_not(model) is None
        rows = list(fill_rows(EXAMPLES, LENGTH))
        _, packed, packed_grads = step(model, pack_rows(rows, LENGTH, 3))
        total, tokens, sums = 0.0, 0, {name: torch.zeros_like(grad) for name, grad in packed_grads.items()}
        for item in EXAMPLES:
            learned = sum(item.learned[1:])
            _, loss, grads = step(model, pad([item], 3))
            total, tokens = total + float(loss) * learned, tokens + learned
            for name, grad in grads.items():
                sums[name] += grad * learned
    assert float(packed) == pytest.approx(total / tokens, rel=1e-5)
    for name, grad in packed_grads.items():
        assert (grad - sums[name] / tokens).norm() < 1e-4 * grad.norm(), name


def test_blooms_over_remote_blocks_are_refused(models: dict[str, Path]) -> None:
    with loopback(models["bloom"]) as swarm:
        assert why_not(remote(models["bloom"], swarm)) == "bloom takes no position_ids"
