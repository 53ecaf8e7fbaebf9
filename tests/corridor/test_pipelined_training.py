"""1F1B under Lightning itself: whatever the trainer multiplies the loss by, the weights are those of all forwards, then all backwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from swarmtune.remote.pipeline import Pipelined
from swarmtune.train.module import CausalLMModule
from swarmtune.types import Pipeline
from tests.harness import batch, loopback, lora, remote, set_values, worst_difference

pytestmark = pytest.mark.filterwarnings("ignore")


class Repeated(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Six batches."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return batch(padding="left", seed=index)


class Scaled(CausalLMModule):
    """Somebody's own: a loss that is twice the model's."""

    def forward(self, **given: Tensor) -> Any:
        output = super().forward(**given)
        output.loss = 2 * output.loss
        return output


def trained(
    path: Path, directory: Path, pipeline: Pipeline, kind: type[CausalLMModule] = CausalLMModule, **flags: Any
) -> tuple[dict[str, Tensor], int]:
    """The adapter after some steps, and how many batches were pipelined."""
    with loopback(path, micro_batch_tokens=10, pipeline=pipeline) as swarm:
        model = remote(path, swarm, lora("bloom"))
        set_values([dict(model.adapter.named_parameters())])
        module = kind(model, lr=1e-2, warmup_steps=0, schedule="constant")
        trainer = Trainer(
            default_root_dir=directory, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, max_epochs=1, **flags,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(Repeated(), batch_size=None))
        pipelined = module._pipelined._batches if isinstance(module._pipelined, Pipelined) else 0
        return {name: parameter.detach().clone() for name, parameter in model.adapter.named_parameters()}, pipelined


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        ({}, 1e-4),
        ({"accumulate_grad_batches": 3}, 1e-4),
        ({"accumulate_grad_batches": 4, "gradient_clip_val": 0.1}, 1e-4),
        ({"precision": "bf16-mixed"}, 5e-2),
        ({"precision": "16-mixed"}, 5e-2),
    ],
    ids=str,
)
def test_weights_are_those_of_all_forwards_then_all_backwards(bloom: Path, tmp_path: Path, flags: dict[str, Any], tolerance: float) -> None:
    expected, none = trained(bloom, tmp_path, Pipeline.GPIPE, **flags)
    found, all_of_them = trained(bloom, tmp_path, Pipeline.ONE_F_ONE_B, **flags)
    assert (none, all_of_them) == (0, 6)
    assert worst_difference(expected, found) < tolerance


def test_a_module_with_a_forward_of_its_own_is_not_passed_by(bloom: Path, tmp_path: Path) -> None:
    expected, _ = trained(bloom, tmp_path, Pipeline.GPIPE, Scaled)
    found, pipelined = trained(bloom, tmp_path, Pipeline.ONE_F_ONE_B, Scaled)
    assert pipelined == 0
    assert worst_difference(expected, found) == 0
