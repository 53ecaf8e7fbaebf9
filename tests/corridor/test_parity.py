"""The remote model against the same model run locally."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BioGptConfig

from swarmtune.errors import UsageError
from tests.harness import batch, local_peft, loopback, lora, remote, same_bits, set_values, step, trainable, worst_difference

FAMILIES = ("bloom", "llama")
SPANS = {"one": ["0:4"], "two": ["0:2", "2:4"], "three": ["0:1", "1:3", "3:4"], "overlapping": ["0:3", "2:4"]}


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_every_gradient_equal_local_to_the_bit(models: dict[str, Path], family: str, spans: list[str], padding: str | None) -> None:
    local = local_peft(models[family], lora(family))
    with loopback(models[family], spans) as swarm:
        model = remote(models[family], swarm, lora(family))
        set_values([trainable(local), dict(model.adapter.named_parameters())])
        expected, found = step(local, batch(padding=padding)), step(model, batch(padding=padding))
    assert torch.equal(expected[0], found[0])
    assert torch.equal(expected[1], found[1])
    assert same_bits(expected[2], found[2])
    assert all(grad.norm() > 0 for grad in found[2].values())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_over_four_micro_batches_equal_local_within_1e_6_of_the_norm(models: dict[str, Path], family: str) -> None:
    local = local_peft(models[family], lora(family))
    with loopback(models[family], micro_batch_tokens=10) as swarm:
        model = remote(models[family], swarm, lora(family))
        set_values([trainable(local), dict(model.adapter.named_parameters())])
        expected, found = step(local, batch()), step(model, batch())
        again = step(model, batch())
        assert swarm.traffic().calls == 4 * 2 * 2 * 2
    assert worst_difference(expected[2], found[2]) <= 1e-6
    assert same_bits(found[2], again[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_body_under_an_fp32_adapter_equals_local_to_the_bit(models: dict[str, Path], family: str) -> None:
    local = local_peft(models[family], lora(family), torch.bfloat16)
    with loopback(models[family], dtype=torch.bfloat16) as swarm:
        model = remote(models[family], swarm, lora(family))
        assert next(model.parameters()).dtype is torch.bfloat16
        set_values([trainable(local), dict(model.adapter.named_parameters())])
        expected, found = step(local, batch()), step(model, batch())
    assert all(grad.dtype is torch.float32 for grad in found[2].values())
    assert torch.equal(expected[0], found[0])
    assert same_bits(expected[2], found[2])


@pytest.mark.parametrize("config", [lora("bloom", r=10), lora("bloom", r=4, rank_pattern={"dense_h_to_4h": 2}, use_rslora=True),
                                    lora("bloom", layers_to_transform=[1, 2]), lora("bloom", alpha_pattern={"h.1.mlp.dense_h_to_4h": 32}),
                                    IA3Config(target_modules=["query_key_value", "dense_4h_to_h"], feedforward_modules=["dense_4h_to_h"])],
                         ids=["rank-is-sequence-length", "ranks-per-module", "some-layers", "alpha-per-module", "ia3"])  # fmt: skip
def test_adapter_settings_mean_what_they_mean_to_peft(bloom: Path, config: object) -> None:
    torch.manual_seed(7)
    local = local_peft(bloom, config)
    with loopback(bloom, ["0:1", "1:4"]) as swarm:
        torch.manual_seed(7)
        model = remote(bloom, swarm, config)
        assert same_bits(trainable(local), dict(model.adapter.named_parameters())), "a fresh adapter has PEFT's values under the same seed"
        assert torch.equal(local(**batch()).logits, model(**batch()).logits)
        set_values([trainable(local), dict(model.adapter.named_parameters())])
        expected, found = step(local, batch()), step(model, batch())
    assert torch.equal(expected[1], found[1])
    assert same_bits(expected[2], found[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_remote_model_holds_no_body_parameters_and_only_the_adapter_learns(models: dict[str, Path], family: str) -> None:
    whole = AutoModelForCausalLM.from_pretrained(models[family])
    blocks = {
        id(parameter) for layer in whole.get_submodule("transformer.h" if family == "bloom" else "model.layers") for parameter in layer.parameters()
    }
    ends = sum(parameter.numel() for parameter in whole.parameters() if id(parameter) not in blocks)
    with loopback(models[family]) as swarm:
        model = remote(models[family], swarm, lora(family))
        learns = sum(parameter.numel() for parameter in model.adapter.parameters())
        assert sum(parameter.numel() for parameter in model.parameters()) == ends + learns
        assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == learns
        assert not list(model.body.parameters())


def test_two_clients_with_different_ranks_share_a_server(bloom: Path) -> None:
    with loopback(bloom, ["0:4"]) as swarm:
        for rank in (2, 6, 2):
            local, model = local_peft(bloom, lora("bloom", r=rank)), remote(bloom, swarm, lora("bloom", r=rank))
            set_values([trainable(local), dict(model.adapter.named_parameters())], seed=rank)
            assert same_bits(step(local, batch())[2], step(model, batch())[2])


def test_exported_adapter_gives_the_same_logits_in_a_local_peft_model_and_loads_here(bloom: Path, tmp_path: Path) -> None:
    with loopback(bloom) as swarm:
        model = remote(bloom, swarm, lora("bloom"))
        set_values([dict(model.adapter.named_parameters())])
        model.adapter.save_pretrained(tmp_path / "adapter")
        local = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bloom), tmp_path / "adapter").eval()
        assert torch.equal(local(**batch()).logits, model(**batch()).logits)
        again = remote(bloom, swarm, str(tmp_path / "adapter"))
        assert same_bits(dict(model.adapter.named_parameters()), dict(again.adapter.named_parameters()))
        model.adapter.save_pretrained(tmp_path / "adapter")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["adapter"]


def test_adapter_trained_by_peft_loads_here(bloom: Path, tmp_path: Path) -> None:
    local = local_peft(bloom, lora("bloom"))
    set_values([trainable(local)])
    local.save_pretrained(tmp_path)
    with loopback(bloom) as swarm:
        assert torch.equal(local(**batch()).logits, remote(bloom, swarm, str(tmp_path))(**batch()).logits)


def test_adapter_of_another_rank_is_refused_and_changes_nothing(bloom: Path, tmp_path: Path) -> None:
    local_peft(bloom, lora("bloom", r=2)).save_pretrained(tmp_path)
    with loopback(bloom) as swarm:
        model = remote(bloom, swarm, lora("bloom", r=4))
        before = {name: parameter.clone() for name, parameter in model.adapter.named_parameters()}
        with pytest.raises(UsageError, match="does not fit"):
            model.adapter.load_pretrained(tmp_path)
        assert same_bits(before, dict(model.adapter.named_parameters()))


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_without_a_cache_equals_local(models: dict[str, Path], family: str) -> None:
    local = local_peft(models[family], lora(family))
    ids = batch(rows=2, tokens=5)["input_ids"]
    with loopback(models[family]) as swarm:
        model = remote(models[family], swarm, lora(family))
        set_values([trainable(local), dict(model.adapter.named_parameters())])
        options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(local.generate(input_ids=ids, use_cache=False, **options), model.generate(ids, **options))


def test_train_mode_switches_the_adapter_and_leaves_the_frozen_model_in_eval_mode(tmp_path: Path) -> None:
    """BioGPT's stem calls a functional dropout when it trains."""
    torch.manual_seed(0)
    config = BioGptConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=96, intermediate_size=64, max_position_embeddings=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    adapter = LoraConfig(r=2, target_modules=["q_proj", "fc1"], task_type="CAUSAL_LM")
    local = local_peft(tmp_path, adapter)
    with loopback(tmp_path, ["0:1", "1:2"]) as swarm:
        model = remote(tmp_path, swarm, adapter)
        set_values([trainable(local), dict(model.adapter.named_parameters())])
        model.train()
        assert model.training
        assert model.adapter.training
        expected, found = step(local, batch()), step(model, batch())
    assert torch.equal(expected[0], found[0])
    assert same_bits(expected[2], found[2])


@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions", "use_cache"])
def test_outputs_that_would_be_wrong_are_refused(bloom: Path, option: str) -> None:
    with loopback(bloom) as swarm:
        with pytest.raises(UsageError, match=option):
            remote(bloom, swarm)(input_ids=batch()["input_ids"], **{option: True})


def test_arguments_that_would_not_reach_the_blocks_are_refused(models: dict[str, Path]) -> None:
    with loopback(models["llama"]) as swarm:
        with pytest.raises(UsageError, match="is_causal does not reach remote blocks"):
            remote(models["llama"], swarm)(input_ids=batch()["input_ids"], is_causal=False)


def test_a_checkpoint_without_its_body_is_not_written(bloom: Path, tmp_path: Path) -> None:
    with loopback(bloom) as swarm:
        with pytest.raises(UsageError, match=r"model\.adapter\.save_pretrained"):
            remote(bloom, swarm).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
