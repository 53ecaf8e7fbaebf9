"""Tiny models, in-process servers and the comparisons that the corridor tests share."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel

from servers.executor import Executor
from servers.handler import CallHandler
from servers.span import Span
from servers.weights import load_blocks
from swarmtune.model import load_causal_lm
from swarmtune.remote.chain import ChainSettings
from swarmtune.skeleton import check_identity, config_digest, load_config
from swarmtune.swarm import Swarm
from swarmtune.transport.base import TransportError
from swarmtune.transport.loop import LoopThread
from swarmtune.transport.loopback import LoopbackTransport
from swarmtune.types import BlockSpan
from swarmtune.wire.frames import Encoded, Incoming, parse_json
from swarmtune.wire.messages import ServerInfo

VOCABULARY = 96
TARGETS = {"bloom": ["query_key_value", "dense_h_to_4h"], "llama": ["q_proj", "v_proj", "down_proj"]}


def tiny_config(family: str, layers: int = 4) -> PretrainedConfig:
    common: dict[str, Any] = {"hidden_size": 48, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    if family == "bloom":
        return BloomConfig(n_layer=layers, n_head=4, **common)
    if family == "gpt2":
        return GPT2Config(n_layer=layers, n_head=4, n_positions=32, **common)
    return LlamaConfig(num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80, **common)


def save_tiny(family: str, directory: Path, seed: int = 0, layers: int = 4) -> Path:
    """A sharded checkpoint with weights large enough that every gradient matters."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, layers))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(directory, max_shard_size="60KB")
    return directory


def lora(family: str, **settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS[family], "task_type": "CAUSAL_LM", **settings})


def local_peft(path: Path, config: PeftConfig, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype=dtype), copy.deepcopy(config)).eval()


def trainable(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def set_values(adapters: Sequence[Mapping[str, Tensor]], seed: int = 5) -> None:
    """The same random values for each; fresh LoRA would leave half of the gradients at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in adapters[0]:
            value = torch.randn(adapters[0][name].shape, generator=generator) * 0.1
            for adapter in adapters:
                adapter[name].copy_(value)


def batch(rows: int = 4, tokens: int = 10, padding: str | None = None, seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY, (rows, tokens), generator=generator)
    found = {"input_ids": ids, "labels": ids.clone()}
    if padding is not None:
        mask = torch.ones_like(ids)
        mask[0, : 3 if padding == "left" else None] = 0
        if padding == "right":
            mask[0] = 1
            mask[1, -4:] = 0
        found["attention_mask"] = mask
        found["labels"][mask == 0] = -100
    return found


def on_device(device: torch.device, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


@dataclass
class Faults:
    """What a transport does to numbered calls of the chain: ``before`` cuts the peer ahead of the call, ``after`` when its answer is ready."""

    before: set[int] = field(default_factory=set)
    after: set[int] = field(default_factory=set)
    log: list[tuple[str, str]] = field(default_factory=list)


class FaultyTransport(LoopbackTransport):
    """Loopback that kills the called server at chosen calls; descriptions are not counted."""

    def __init__(self, handlers: Mapping[str, CallHandler], faults: Faults) -> None:
        super().__init__(handlers)
        self.faults = faults

    async def call(self, peer: str, request: Encoded, timeout_s: float) -> Incoming:
        kind = parse_json(request.header)["kind"]
        if kind == "info":
            return await super().call(peer, request, timeout_s)
        number = len(self.faults.log)
        self.faults.log.append((kind, peer))
        if number in self.faults.before:
            await self.kill(peer)
        answer = await super().call(peer, request, timeout_s)
        if number in self.faults.after:
            await self.kill(peer)
            raise TransportError(f"peer {peer} died with its answer")
        return answer


class HandlerDiscovery:
    """Finds whatever the transport can call."""

    def __init__(self, transport: LoopbackTransport) -> None:
        self._transport = transport

    async def peers(self, model: str) -> set[str]:
        return set(self._transport.handlers)


def make_handler(
    path: Path, blocks: str, dtype: torch.dtype = torch.float32, executor: Executor | None = None, quantise: str = "none"
) -> CallHandler:
    config = load_config(str(path))
    site, span, device = check_identity(config), BlockSpan.parse(blocks), torch.device("cpu")
    weights = load_blocks(str(path), config, site, span, dtype, device, quantise=quantise)
    name = str(dtype).removeprefix("torch.")
    numeric = {"quantisation": quantise}
    numeric_class = f"class-{name}" if quantise == "none" else f"class-{name}-{quantise}"
    info = ServerInfo(config_digest(config), site.num_blocks, span, weights.digests, name, numeric_class, numeric, "test", f"server of {blocks}")
    return CallHandler(info, Span(config, site, span, weights, dtype, device), executor or Executor().start())


@contextmanager
def loopback(
    path: Path,
    spans: Sequence[str] = ("0:2", "2:4"),
    *,
    dtype: torch.dtype = torch.float32,
    quantise: str = "none",
    faults: Faults | None = None,
    handlers: Mapping[str, CallHandler] | None = None,
    **settings: Any,
) -> Iterator[Swarm]:
    """A swarm in this process: real frames, real handlers, no network."""
    own = [Executor().start() for _ in spans] if handlers is None else []
    if handlers is None:
        handlers = {f"peer{number}": make_handler(path, span, dtype, own[number], quantise) for number, span in enumerate(spans)}
    transport = FaultyTransport(handlers, faults or Faults())
    loop = LoopThread().start()
    try:
        yield Swarm(loop, transport, HandlerDiscovery(transport), ChainSettings(**{"patience_s": 5.0, **settings}))
    finally:
        loop.run(transport.close())
        loop.close()
        for executor in own:
            executor.close()


def remote(path: Path, swarm: Swarm, adapter: PeftConfig | str | None = None, **options: Any) -> PreTrainedModel:
    return load_causal_lm(str(path), swarm, adapter=copy.deepcopy(adapter), **options).eval()


def step(model: torch.nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, loss and gradients by name of one training step."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    learns = trainable(model.adapter if hasattr(model, "adapter") else model)
    grads = {name: parameter.grad.clone() for name, parameter in learns.items()}
    return output.logits.detach(), output.loss.detach(), grads


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def worst_difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Largest norm of a difference over the norm, per tensor."""
    assert list(a) == list(b)
    return max(((a[name] - b[name]).norm() / a[name].norm()).item() for name in a)
