"""The random generators from which layers on a device draw."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def random_state(device: torch.device) -> list[Tensor]:
    """Of the CPU's generator, and of the device's own, where it has one."""
    return [torch.get_rng_state(), *([] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state(device)])]


def set_random_state(device: torch.device, states: Sequence[Tensor]) -> None:
    """What ``random_state`` has returned."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state, device)
