"""What a client holds in memory: stem, head and adapter; nothing that grows with the body, and no skeleton of it."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PrefixTuningConfig, VBLoRAConfig
from torch import Tensor
from transformers.models.bloom.modeling_bloom import BloomBlock

from swarmtune import DeepPromptConfig, HeadConfig, load_sequence_classifier
from tests.harness import batch, loopback, lora, remote, save_tiny, step

ADAPTERS: dict[str, Any] = {
    "none": lambda: None,
    "lora": lambda: lora("bloom"),
    "dora": lambda: lora("bloom", use_dora=True),
    "lora on some layers": lambda: lora("bloom", layers_to_transform=[0, 2], rank_pattern={"query_key_value": 2}),
    "adalora": lambda: AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["query_key_value"], task_type="CAUSAL_LM"),
    "vblora": lambda: VBLoRAConfig(r=4, num_vectors=8, vector_length=16, target_modules=["query_key_value"], task_type="CAUSAL_LM"),
    "prefix tuning": lambda: PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "lora, prompts and head": lambda: [lora("bloom"), DeepPromptConfig(3), HeadConfig()],
}


@pytest.fixture(scope="module")
def depths(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("depths")
    return {layers: save_tiny("bloom", root / str(layers), layers=layers) for layers in (4, 12)}


def held(tensors: Any) -> int:
    """Bytes of distinct storages."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors if not tensor.is_meta}
    return sum(storages.values())


def everything(model: Any) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def adapter_tensors(model: Any) -> list[Tensor]:
    return [] if model.adapter is None else [*model.adapter.parameters(), *model.adapter.buffers()]


def alive() -> list[Tensor]:
    """All tensors that Python still holds."""
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]


@pytest.mark.parametrize("name", ADAPTERS)
def test_memory_of_the_client_grows_with_the_blocks_by_the_adapter_alone(depths: dict[int, Path], name: str) -> None:
    beside = {}
    for layers, path in depths.items():
        with loopback(path, [f"0:{layers}"]) as swarm:
            model = remote(path, swarm, ADAPTERS[name]())
            beside[layers] = held(everything(model)) - held(adapter_tensors(model))
            assert torch.isfinite(model(**batch()).loss)
    assert beside[4] == beside[12] > 0


@pytest.mark.parametrize("name", ADAPTERS)
def test_no_block_and_no_skeleton_outlives_the_loading(depths: dict[int, Path], name: str) -> None:
    path = depths[12]
    with loopback(path, ["0:12"]) as swarm:
        gc.collect()
        before, kept = {id(thing) for thing in gc.get_objects() if type(thing) is BloomBlock}, held(alive())
        model = remote(path, swarm, ADAPTERS[name]())
        gc.collect()
        blocks = [thing for thing in gc.get_objects() if type(thing) is BloomBlock and id(thing) not in before]
        grown = held(alive()) - kept
    assert not blocks
    # Beside the model, only what the servers answered may be kept, and that is in the adapter.
    assert grown <= held(everything(model)) + 4096


def test_nothing_of_a_step_is_held_after_it(depths: dict[int, Path]) -> None:
    """Neither what entered each leg nor what travelled, however many blocks there are."""
    with loopback(depths[12], ["0:4", "4:12"], micro_batch_tokens=20) as swarm:
        model = remote(depths[12], swarm, [lora("bloom"), DeepPromptConfig(3)])
        step(model, batch())
        model.zero_grad(set_to_none=True)
        before = held(alive())
        for _ in range(3):
            step(model, batch())
        model.zero_grad(set_to_none=True)
        assert held(alive()) <= before + 4096


def test_a_classifier_holds_no_block_either(depths: dict[int, Path]) -> None:
    beside = {}
    for layers, path in depths.items():
        with loopback(path, [f"0:{layers}"]) as swarm:
            model: Any = load_sequence_classifier(str(path), swarm, adapter=lora("bloom", task_type="SEQ_CLS"), num_labels=2)
            beside[layers] = held(everything(model)) - held(adapter_tensors(model))
    assert beside[4] == beside[12]
