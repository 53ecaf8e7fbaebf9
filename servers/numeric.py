"""The numeric class of a server: servers of one class give the same bits for the same call."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version

import torch
from transformers import PretrainedConfig

from swarmtune.wire.frames import dump_json


def numeric_facts(config: PretrainedConfig, model: str, dtype: torch.dtype, device: torch.device, quantisation: str = "none") -> dict[str, str]:
    """What decides the bits of a result, for people to compare."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} mkldnn={torch.backends.mkldnn.is_available()}"
    library = {} if quantisation == "none" else {"bitsandbytes": version("bitsandbytes")}
    return {
        "model": model,
        "dtype": str(dtype).removeprefix("torch."),
        "quantisation": quantisation,
        **library,
        "device": device.type,
        "hardware": hardware,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "peft": version("peft"),
        "attention": str(config._attn_implementation or "sdpa"),
        "threads": str(torch.get_num_threads()),
        "mode": "eager",
    }


def numeric_class(facts: dict[str, str]) -> str:
    """Sixteen hexadecimal digits of the facts."""
    return hashlib.sha256(dump_json(facts)).hexdigest()[:16]


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices itself, and does not only store them."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() or platform.machine() == "aarch64"


def pick_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """What ``dtype=auto`` computes in: the stored type where the device does, else bfloat16 for half of the memory, else float32.

    What is stored in float32 stays so: to round a model's weights is for people to decide.
    """
    if stored not in (torch.float16, torch.bfloat16) or (stored is torch.float16 and device.type == "cuda"):
        return stored
    return torch.bfloat16 if computes_bfloat16(device) else torch.float32
