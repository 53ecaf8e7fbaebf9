"""The LightningModules that train an adapter, on a causal language model or a classifier, wherever the model's body runs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from swarmtune.errors import NonFinite, UsageError
from swarmtune.remote.pipeline import Pipelined
from swarmtune.train.packing import choose_packing
from swarmtune.train.windows import IGNORED_LABEL

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
"""Our names of schedules, and transformers'."""


def perplexity(loss: float) -> float:
    """``exp(loss)``, infinite where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


class AdapterModule(LightningModule):
    """Trains whatever in ``model.adapter`` requires a gradient; a subclass says how it is validated.

    Args:
        model: called with ``input_ids``, ``attention_mask`` and ``labels``, it returns something with a ``loss``; its ``adapter`` is what learns.
        lr: highest learning rate.
        weight_decay: AdamW's.
        betas: AdamW's.
        schedule: ``cosine``, ``linear`` or ``constant``, after the warm-up.
        warmup_steps: optimizer steps over which the learning rate rises from 0.
        hyperparameters: plain values to keep in checkpoints and show in loggers.
    """

    model: Any

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        schedule: str = "cosine",
        warmup_steps: int = 10,
        hyperparameters: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model.train()
        self.strict_loading = False  # a checkpoint holds only what learns
        self.lr, self.weight_decay, self.betas, self.schedule, self.warmup_steps = lr, weight_decay, betas, schedule, warmup_steps
        if hyperparameters is not None:
            self.save_hyperparameters(dict(hyperparameters))

    def learnable(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, under this module's names."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def forward(self, **batch: Tensor) -> Any:
        """The model's own output."""
        return self.model(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The mean loss over what the batch asks for."""
        loss = self.training_loss(batch)
        if not torch.isfinite(loss):
            raise NonFinite(f"the training loss became {loss.item()} at step {self.global_step}: try a lower optimizer.lr or a higher precision")
        self.log("train_loss", loss, batch_size=len(batch["input_ids"]), logger=False)  # the Meter logs one row for each optimizer step
        self.log("lr", self.optimizers().param_groups[0]["lr"], logger=False)  # type: ignore[union-attr]
        return loss

    def training_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """What a step minimises."""
        loss: Tensor = self(**batch).loss
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop before a gradient that is not finite reaches the weights; fp16's loss scaler handles its own."""
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return
        bad = [name for name, parameter in self.learnable().items() if parameter.grad is not None and not torch.isfinite(parameter.grad).all()]
        if bad:
            blocks = {int(found[1]): name for name in reversed(bad) if (found := re.search(r"\.(\d+)\.", name))}
            # Gradients run from the last block to the first, so the last bad block is where it began.
            name = blocks[max(blocks)] if blocks else bad[0]
            where = f", first in block {max(blocks)} (they run from the last block to the first)" if blocks else ""
            raise NonFinite(
                f"{len(bad)} gradients are not finite at step {self.global_step}{where}: {name}; weights are unchanged: try a lower optimizer.lr, "
                "trainer.gradient_clip_val, or servers that compute in float32",
                max(blocks) if blocks else None,
            )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's, and then the tuner's own rule (AdaLoRA moves ranks between modules) while the gradients are there."""
        step = self.global_step
        super().optimizer_step(*args, **kwargs)
        after_step = getattr(getattr(self.model, "adapter", None), "after_step", None)
        if after_step is not None:
            after_step(step)

    def log_validation(self, **values: float) -> None:
        """Log what a whole validation gave."""
        # Loggers count steps from 0: a validation belongs to the step before it, wherever it runs.
        place = {"step": float(self.global_step - 1), "epoch": float(self.current_epoch)} if self.global_step else {}
        self.log_dict({**values, **place})

    def finite(self, loss: Tensor) -> float:
        """A validation loss as a number.

        Raises:
            NonFinite: it is none.
        """
        if not math.isfinite(float(loss)):
            raise NonFinite(f"the validation loss became {float(loss)} at step {self.global_step}")
        return float(loss)

    def configure_optimizers(self) -> Any:
        """AdamW on what learns, its schedule moved by optimizer steps."""
        from transformers import get_scheduler

        parameters = list(self.learnable().values())
        if not parameters:
            raise UsageError("nothing learns: the model has no adapter with parameters to train")
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps) and self.schedule != "constant":
            raise UsageError(f"optimizer.schedule={self.schedule} needs an end: set trainer.max_steps or trainer.max_epochs")
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
        total = None if math.isinf(steps) else max(int(steps), 1)
        scheduler = get_scheduler(SCHEDULES[self.schedule], optimizer, num_warmup_steps=self.warmup_steps, num_training_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what learns."""
        kept = self.learnable()
        checkpoint["state_dict"] = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name in kept}
        rule_state = getattr(getattr(self.model, "adapter", None), "rule_state", None)
        checkpoint["adapter_rule"] = rule_state() if rule_state is not None else {}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the tuner's rule go on where it was."""
        if checkpoint.get("adapter_rule"):
            self.model.adapter.load_rule_state(checkpoint["adapter_rule"])


class CausalLMModule(AdapterModule):
    """Next-token training; see ``AdapterModule`` for its arguments."""

    _val_loss_sum, _val_tokens = 0.0, 0
    _packing_checked = False
    _pipelined: Pipelined | None = None

    def training_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The mean over the predicted tokens; where the batch is cut into micro-batches, their forwards and backwards overlap."""
        if type(self).forward is not CausalLMModule.forward:  # a subclass computes its own
            return super().training_loss(batch)
        self._check(batch)
        if self._pipelined is None:
            self._pipelined = Pipelined(self.model)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = (scaler.get_scale() if scaler is not None else 1.0) / self.trainer.accumulate_grad_batches
        loss = self._pipelined(batch, scale)
        return super().training_loss(batch) if loss is None else loss

    def forward(self, **batch: Tensor) -> Any:
        """The model's own output."""
        self._check(batch)
        return super().forward(**batch)

    def _check(self, batch: Mapping[str, Tensor]) -> None:
        """Refuse what this model would compute wrongly.

        Raises:
            UsageError: labelled texts, or packed ones that this model would not keep apart.
        """
        if "labels" in batch and batch["labels"].dim() != 2:
            raise UsageError("data.format=labels is for a classifier: use recipe=lora_classify")
        if "position_ids" in batch and not self._packing_checked:
            choose_packing("always", self.model)
            self._packing_checked = True

    def on_validation_epoch_start(self) -> None:
        """Forget the sums of the validation before."""
        self._val_loss_sum, self._val_tokens = 0.0, 0

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the sums, weighted by its predicted tokens."""
        tokens = int((batch["labels"][..., 1:] != IGNORED_LABEL).sum())
        if tokens:
            self._val_loss_sum += self.finite(self(**batch).loss) * tokens
            self._val_tokens += tokens

    def on_validation_epoch_end(self) -> None:
        """Log the exact mean over all predicted tokens, and its perplexity."""
        if self._val_tokens:
            loss = self._val_loss_sum / self._val_tokens
            self.log_validation(val_loss=loss, val_ppl=perplexity(loss))


class ClassifierModule(AdapterModule):
    """Training of a sequence classifier; see ``AdapterModule`` for its arguments. The model gives ``logits`` of (batch, classes)."""

    _val_loss_sum, _val_right, _val_rows = 0.0, 0, 0

    def on_validation_epoch_start(self) -> None:
        """Forget the sums of the validation before."""
        self._val_loss_sum, self._val_right, self._val_rows = 0.0, 0, 0

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count the rows whose class was found, and add their loss."""
        output, rows = self(**batch), len(batch["labels"])
        self._val_loss_sum += self.finite(output.loss) * rows
        self._val_right += int((output.logits.argmax(dim=-1) == batch["labels"]).sum())
        self._val_rows += rows

    def on_validation_epoch_end(self) -> None:
        """Log the exact mean loss and accuracy over all rows."""
        if self._val_rows:
            self.log_validation(val_loss=self._val_loss_sum / self._val_rows, val_accuracy=self._val_right / self._val_rows)
