"""The numeric class of a server: servers of one class give the same bits for the same call."""

from __future__ import annotations

import hashlib
import os
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PretrainedConfig

from swarmtune.notices import printable
from swarmtune.wire.frames import dump_json

CPU_VARIABLES = (
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    *(() if torch.backends.mkl.is_available() else ("OPENBLAS_CORETYPE",)),
    *(f"{library}_{what}" for library in ("ONEDNN", "DNNL") for what in ("CPU_ISA_HINTS", "DEFAULT_FPMATH_MODE", "MAX_CPU_ISA")),
)
CUDA_VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
EXACT = {
    "ONEDNN_DEFAULT_FPMATH_MODE": "STRICT",
    "DNNL_DEFAULT_FPMATH_MODE": "STRICT",
    "NVIDIA_TF32_OVERRIDE": "0",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0",
}
"""Those by which float32 can be multiplied in a shorter type, each with the value by which it is not."""
MAX_VALUE = 200


def numeric_facts(config: PretrainedConfig, model: str, dtype: torch.dtype, device: torch.device, quantisation: str = "none") -> dict[str, str]:
    """What decides the bits of a result, for people to compare."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_hardware()
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
        **variables(device),
    }


def numeric_class(facts: dict[str, str]) -> str:
    """Sixteen hexadecimal digits of the facts."""
    return hashlib.sha256(dump_json(facts)).hexdigest()[:16]


def cpu_hardware() -> str:
    """What libraries choose their code for this CPU by, where no variable of theirs says otherwise.

    The make is part of it, because MKL takes other code on CPUs that are not Intel's.
    """
    matrices = {
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "mkldnn": torch.backends.mkldnn.is_available(),
    }
    return " ".join([platform.machine(), cpu_vendor(), torch.backends.cpu.get_cpu_capability(), *(name for name, there in matrices.items() if there)])


def variables(device: torch.device) -> dict[str, str]:
    """The variables by which whoever starts a server makes its libraries compute otherwise, with their values; those that are set."""
    names = CUDA_VARIABLES if device.type == "cuda" else CPU_VARIABLES
    values = {name: printable(os.environ.get(name, ""), MAX_VALUE).strip() for name in names}
    return {name: value for name, value in values.items() if value}


def shortened_products(dtype: torch.dtype, device: torch.device) -> str | None:
    """The variable that has float32 multiplied in a shorter type, with its value; ``None`` where there is none."""
    found = variables(device)
    if "ONEDNN_DEFAULT_FPMATH_MODE" in found:
        found.pop("DNNL_DEFAULT_FPMATH_MODE", None)  # the older name of the same
    short = (f"{name}={value}" for name, value in found.items() if name in EXACT and value.upper() != EXACT[name])
    return next(short, None) if dtype is torch.float32 else None


@cache
def cpu_vendor() -> str:
    """The make of the CPU as Linux names it (``GenuineIntel``, ``AuthenticAMD``, an implementer's number on ARM); ``unknown`` elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("vendor_id", "CPU implementer"):
            return value.strip() or "unknown"
    return "unknown"


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
