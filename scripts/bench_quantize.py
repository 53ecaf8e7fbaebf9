"""What each way of holding the blocks costs and saves: the measuring part of ``scripts/bench quantize``."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import swarmtune
from servers.executor import Executor
from servers.handler import CallHandler
from servers.numeric import numeric_class, numeric_facts
from servers.quantize import held_bytes
from servers.span import Span
from servers.weights import load_blocks
from swarmtune.model import load_causal_lm
from swarmtune.remote.chain import ChainSettings
from swarmtune.skeleton import check_identity, config_digest, hidden_size, load_config
from swarmtune.swarm import Swarm
from swarmtune.transport.loop import LoopThread
from swarmtune.transport.loopback import LoopbackTransport
from swarmtune.types import BlockSpan
from swarmtune.wire.messages import ServerInfo

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "quantization.md"
BEGIN, END = "<!-- measured: written by scripts/bench quantize --keep -->\n", "<!-- end -->\n"
POCKET = ROOT / "swarmtune" / "assets" / "pocket_bloom"
MODES = (*((dtype, "none") for dtype in ("float32", "bfloat16", "float16")), *((d, q) for q in ("int8", "nf4") for d in ("float32", "bfloat16")))
ROWS, TOKENS = 4, 128


class Everyone:
    """Finds whatever the transport can call."""

    def __init__(self, transport: LoopbackTransport) -> None:
        self._transport = transport

    async def peers(self, model: str) -> set[str]:
        """All of them."""
        return set(self._transport.handlers)


def measure(directory: Path, rounds: int) -> str:
    """Both models in every mode; prints JSON lines, returns Markdown."""
    parts = [heading()]
    for title, path, ids in (
        ("Pocket BLOOM (4 blocks of hidden size 224, trained, stored in bfloat16), on text of Python's help topics", POCKET, pocket_ids()),
        ("LLaMA-like (4 blocks of hidden size 512, inner size 1376, random weights), on random tokens", *random_llama(directory)),
    ):
        rows = measure_model(path, ids, rounds)
        for row in rows:
            print(json.dumps({"bench": "quantize", "model": path.name, **row}), flush=True)
        parts.append(markdown(title, rows))
    return "\n".join(parts)


def pocket_ids() -> torch.Tensor:
    """Text that the pocket model can read."""
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    ids = tokenizer("\n".join(topics[name] for name in sorted(topics)[:8]), return_tensors="pt").input_ids[0]
    return ids[: ROWS * TOKENS].view(ROWS, TOKENS)


def random_llama(directory: Path) -> tuple[Path, torch.Tensor]:
    """A saved model and tokens for it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, intermediate_size=1376, vocab_size=4096, bos_token_id=1
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory / "llama")
    return directory / "llama", torch.randint(0, 4096, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))


@contextlib.contextmanager
def serving(path: Path, dtype: str, mode: str) -> Iterator[tuple[Swarm, int]]:
    """A swarm of one server in this process, and the bytes that it holds per block."""
    config, element_type, device = load_config(str(path)), getattr(torch, dtype), torch.device("cpu")
    site = check_identity(config)
    span, digest = BlockSpan(0, site.num_blocks), config_digest(config)
    weights = load_blocks(str(path), config, site, span, element_type, device, quantise=mode)
    facts = numeric_facts(config, digest, element_type, device, mode)
    info = ServerInfo(digest, site.num_blocks, span, weights.digests, dtype, numeric_class(facts), facts, swarmtune.__version__)
    executor = Executor().start()
    transport = LoopbackTransport({"server": CallHandler(info, Span(config, site, span, weights, element_type, device), executor)})
    loop = LoopThread().start()
    try:
        yield Swarm(loop, transport, Everyone(transport), ChainSettings()), sum(map(held_bytes, weights.blocks.values())) // site.num_blocks
    finally:
        loop.run(transport.close())
        loop.close()
        executor.close()


def measure_model(path: Path, ids: torch.Tensor, rounds: int) -> list[dict[str, Any]]:
    """One row per mode, all modes taking turns, so that a busy machine slows all of them alike."""
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    with contextlib.ExitStack() as stack:
        models, per_block = {}, {}
        for dtype, mode in MODES:
            swarm, per_block[dtype, mode] = stack.enter_context(serving(path, dtype, mode))
            models[dtype, mode] = load_causal_lm(path, swarm, adapter=lora, dtype="float32")
        hidden_BTH = torch.randn(ROWS, TOKENS, hidden_size(load_config(str(path))), generator=torch.Generator().manual_seed(2))
        added, losses, seconds = {}, {}, {key: [] for key in models}
        for key, model in models.items():
            with torch.no_grad():
                added[key] = model.body(hidden_BTH) - hidden_BTH
                losses[key] = float(model(input_ids=ids, labels=ids).loss)
            model(input_ids=ids, labels=ids).loss.backward()
        for _ in range(rounds):
            for key, model in models.items():
                began = time.perf_counter()
                model(input_ids=ids, labels=ids).loss.backward()
                seconds[key].append(time.perf_counter() - began)
    first = MODES[0]
    medians = {key: statistics.median(times) for key, times in seconds.items()}
    return [
        {
            "dtype": key[0],
            "quantize": key[1],
            "bytes_per_block": per_block[key],
            "of_float32": round(per_block[key] / per_block[first], 3),
            "time_ratio": round(medians[key] / medians[first], 2),
            "relative_error": float(f"{((added[key] - added[first]).norm() / added[first].norm()).item():.2g}"),
            "loss": round(losses[key], 4),
            "loss_change": round(losses[key] - losses[first], 4),
        }
        for key in MODES
    ]


def heading() -> str:
    """What was measured, when, on which commit and machine."""
    said = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    machine = f"{os.cpu_count()} cores, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, CPU only"
    libraries = f"torch {torch.__version__}, bitsandbytes {version('bitsandbytes')}"
    return (
        f"Measured {datetime.date.today()}, commit {said.stdout.strip() or 'unknown'}, {machine}, {libraries}. One server in the client's process, "
        f"batch {ROWS} x {TOKENS}, LoRA of rank 8 on every linear layer; all modes took turns. Time is forward and backward against float32.\n"
    )


def markdown(title: str, rows: list[dict[str, Any]]) -> str:
    """One table."""
    lines = [f"**{title}**", "", "| dtype | quantize | KiB per block | of float32 | time | error of what the blocks add | loss | change |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        change = 0.0 if math.isclose(row["loss_change"], 0) else row["loss_change"]
        cells = [row["dtype"], row["quantize"], f"{row['bytes_per_block'] / 1024:.0f}", f"{row['of_float32']:.1%}", f"{row['time_ratio']:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {row['relative_error']:.2g} | {row['loss']:.4f} | {change:+.4f} |")
    return "\n".join([*lines, ""])


def keep(table: str) -> None:
    """Put the tables in the place of the former ones in docs/quantization.md."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{table}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
