"""``generate`` through remote blocks: greedy tokens are those of the local model under the same adapter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from torch import Tensor

from swarmtune import DeepPromptConfig, HeadConfig, StandInConfig
from tests.harness import batch, local_peft, loopback, lora, remote, set_values, trainable

NEW = 5
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}


def config_of(kind: str, family: str) -> PeftConfig:
    if kind == "prompt tuning":
        return PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    if kind == "p-tuning":
        return PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, task_type="CAUSAL_LM")
    if kind == "prefix tuning":
        return PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    return lora(family, lora_dropout=0.5)


def prompt(padded: bool) -> dict[str, Tensor]:
    whole = batch(rows=2, tokens=6, padding="left" if padded else None)
    return {"input_ids": whole["input_ids"], "attention_mask": whole.get("attention_mask", torch.ones_like(whole["input_ids"]))}


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", ["bloom", "llama"])
@pytest.mark.parametrize("kind", ["lora", "prompt tuning", "p-tuning", "prefix tuning"])
def test_greedy_tokens_equal_local_peft(models: dict[str, Path], kind: str, family: str, padded: bool) -> None:
    local: Any = local_peft(models[family], config_of(kind, family))
    with loopback(models[family], ["0:1", "1:4"]) as swarm:
        model = remote(models[family], swarm, config_of(kind, family))
        set_values([trainable(local), dict(model.adapter.named_parameters())])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = local.generate(**prompt(padded), use_cache=kind == "prefix tuning", **GREEDY)
        found = model.generate(**prompt(padded), **GREEDY)
        assert torch.equal(expected, found)
        assert found.shape == (2, 6 + NEW)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", ["bloom", "llama", "gpt2"])
def test_generate_with_deep_prompts_is_the_best_token_of_one_call_after_another(models: dict[str, Path], family: str, padded: bool) -> None:
    adapter = [DeepPromptConfig(3), HeadConfig(), StandInConfig(["*.weight"], layers=[1])]
    with loopback(models[family]) as swarm:
        model = remote(models[family], swarm, adapter)
        with torch.no_grad():
            model.adapter.get_parameter("deep_prompts").normal_()
        inputs = prompt(padded)
        found = model.generate(**inputs, **GREEDY)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        for _ in range(NEW):
            more = {} if family == "bloom" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
            best = model(input_ids=ids, attention_mask=mask, **more).logits[:, -1].argmax(-1, keepdim=True)
            ids, mask = torch.cat([ids, best], dim=1), torch.cat([mask, torch.ones_like(best)], dim=1)
        assert torch.equal(ids, found)
        assert not torch.equal(remote(models[family], swarm)(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("kind", ["lora", "prompt tuning"])
def test_sampled_tokens_follow_the_seed_and_leave_gradients_alone(bloom: Path, kind: str) -> None:
    with loopback(bloom) as swarm:
        model = remote(bloom, swarm, config_of(kind, "bloom"))
        sampled = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            sampled.append(model.generate(**prompt(False), max_new_tokens=NEW, do_sample=True, eos_token_id=None))
        assert torch.equal(sampled[0], sampled[1])
        assert not torch.equal(sampled[0], sampled[2])
        assert all(value.grad is None for value in model.adapter.parameters())
