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
