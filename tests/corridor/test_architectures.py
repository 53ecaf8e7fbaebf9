"""Every architecture of docs/models.md: a remote model against the same model run locally, and the sentence for what cannot be cut."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from servers.executor import Executor
from servers.handler import CallHandler
from swarmtune.errors import AdapterUnsupported, ModelUnsupported
from swarmtune.skeleton import check_identity, find_layers
from tests.architectures import ARCHITECTURES, LAYERS, REFUSED, TOKENS, Architecture
from tests.harness import batch, loopback, make_handler, remote, set_values, trainable

ROWS, PAD = 4, 3
SPANS = {"one": [f"0:{LAYERS}"], "three": ["0:1", "1:2", f"2:{LAYERS}"]}
PADDINGS = (None, "left", "right")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices of 32 columns are slower on several threads; the devices' threads that start from here on inherit it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save(architecture: Architecture, directory: Path) -> None:
    """Random weights, large enough that every gradient matters; the row of the padding token is zero, as the library makes it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(architecture.config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
    model.save_pretrained(directory)


def lora_on_all(model: PreTrainedModel, architecture: Architecture) -> LoraConfig:
    """LoRA on every linear layer in the blocks, except what the row leaves out."""
    site = find_layers(model)
    linear = {name: module for name, module in model.named_modules() if site.split(name) and isinstance(module, nn.Linear | Conv1D)}
    return LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=[name for name in linear if name.rpartition(".")[2] not in architecture.without],
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear.values()),
        task_type="CAUSAL_LM",
    )


def step(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, loss and gradients by name; zeros for what no token reached."""
    model.zero_grad()
    output = model(**inputs, use_cache=False)
    output.loss.backward()
    learns = {name.removeprefix("adapter."): parameter for name, parameter in trainable(model).items()}
    grads = {name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone() for name, parameter in learns.items()}
    return output.logits.detach(), output.loss.detach(), grads


@contextmanager
def servers(path: Path, spans: list[str]) -> Iterator[dict[str, CallHandler]]:
    executors = [Executor().start() for _ in spans]
    try:
        yield {f"server of {span}": make_handler(path, span, executor=executor) for span, executor in zip(spans, executors, strict=True)}
    finally:
        for executor in executors:
            executor.close()


def inputs(architecture: Architecture, padding: str | None) -> dict[str, Tensor]:
    """A batch; without a mask, one of the tokens is the padding token all the same."""
    found = batch(ROWS, TOKENS, padding)
    if padding is None:
        found["input_ids"][0, 5] = PAD
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda each: each.name)
def test_logits_loss_and_every_gradient_equal_local(architecture: Architecture, tmp_path: Path) -> None:
    save(architecture, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    config = lora_on_all(plain, architecture)
    local = get_peft_model(plain, copy.deepcopy(config)).eval()
    set_values([trainable(local)])
    paddings = PADDINGS if architecture.padded else (None,)
    expected = {padding: step(local, inputs(architecture, padding)) for padding in paddings}
    assert any(grad.norm() > 0 for grad in expected[None][2].values())
    number = ARCHITECTURES.index(architecture)
    for count, spans in SPANS.items():
        with servers(tmp_path, spans) as handlers:
            with loopback(tmp_path, handlers=handlers) as swarm:
                model = remote(tmp_path, swarm, config)
                set_values([dict(model.adapter.named_parameters())])
                assert list(trainable(local)) == list(dict(model.adapter.named_parameters()))
                for padding in paddings if count == "three" else paddings[number % len(paddings) :][:1]:
                    found = step(model, inputs(architecture, padding))
                    assert torch.equal(found[0], expected[padding][0]), f"logits over {count}, padding {padding}"
                    assert torch.equal(found[1], expected[padding][1]), f"loss over {count}, padding {padding}"
                    for name, grad in expected[padding][2].items():
                        assert torch.equal(found[2][name], grad), f"gradient of {name} over {count}, padding {padding}"
            if (number % 2 == 0) != (count == "three"):
                continue
            with loopback(tmp_path, handlers=handlers, micro_batch_tokens=TOKENS) as swarm:
                model = remote(tmp_path, swarm, config)
                set_values([dict(model.adapter.named_parameters())])
                found = step(model, inputs(architecture, None))
                assert swarm.traffic().calls >= 2 * ROWS * len(spans) - ROWS
                assert (found[1] - expected[None][1]).abs() <= 1e-6 * expected[None][1]
                for name, grad in expected[None][2].items():
                    assert (found[2][name] - grad).norm() <= architecture.bound * grad.norm(), f"gradient of {name} over four micro-batches"


@pytest.mark.parametrize("architecture", REFUSED, ids=lambda each: each.name)
def test_what_cannot_be_cut_is_refused_in_one_sentence(architecture: Architecture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = architecture.config()
    with pytest.raises(ModelUnsupported) as caught:
        check_identity(config)
    assert architecture.refused in str(caught.value)
    assert "\n" not in str(caught.value)


def test_constants_of_the_library_are_rounded_to_the_served_type_and_not_to_the_stored_one(tmp_path: Path) -> None:
    """Gemma multiplies its embeddings by the root of 32, which bf16 cannot hold."""
    architecture = next(each for each in ARCHITECTURES if each.name == "gemma")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(architecture.config()).to(torch.bfloat16).save_pretrained(tmp_path)
    local = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with loopback(tmp_path, SPANS["three"]) as swarm:
        assert torch.equal(remote(tmp_path, swarm)(**batch()).logits, local(**batch(), use_cache=False).logits)


def test_an_adapter_that_peft_would_put_on_fused_experts_is_refused_in_one_sentence(tmp_path: Path) -> None:
    architecture = next(each for each in ARCHITECTURES if each.name == "qwen3_moe")
    save(architecture, tmp_path)
    adapter = LoraConfig(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
    with loopback(tmp_path, SPANS["one"]) as swarm:
        with pytest.raises(AdapterUnsupported, match=r"on the fused experts in model\.layers\.1\.mlp\.experts") as caught:
            remote(tmp_path, swarm, adapter)
    assert "\n" not in str(caught.value)
