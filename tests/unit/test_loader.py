"""A run that was broken off and resumed sees the batches, and the random numbers, of one that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from swarmtune.train.data import TextDataModule
from swarmtune.train.loader import ResumableLoader, RowBatches
from swarmtune.train.windows import Windows

WINDOWS = 23
POCKET = str(Path(__file__).parents[2] / "swarmtune" / "assets" / "pocket_bloom")


def loader(seed: int = 0, num_workers: int = 0) -> ResumableLoader:
    return ResumableLoader(RowBatches(Windows(torch.arange(WINDOWS * 4, dtype=torch.int32), 4, 0), 3, seed), num_workers=num_workers)


def first_tokens(batches: Any) -> list[list[int]]:
    return [batch["input_ids"][:, 0].tolist() for batch in batches]


def test_a_pass_holds_every_window_once_and_the_next_pass_in_another_order() -> None:
    found = loader()
    one, two = first_tokens(found), first_tokens(found)
    assert len(found) == len(one) == len(two) == 8
    for order in (one, two):
        assert sorted(token for batch in order for token in batch) == list(range(0, WINDOWS * 4, 4))
    assert one != two
    assert one == first_tokens(loader())
    assert one != first_tokens(loader(seed=1))


@pytest.mark.parametrize(("done", "num_workers"), [(0, 0), (3, 0), (8, 0), (11, 0), (11, 2)])
def test_it_goes_on_with_the_very_next_batch(done: int, num_workers: int) -> None:
    whole = loader()
    sequence = first_tokens(whole) + first_tokens(whole) + first_tokens(whole)
    broken, seen = loader(num_workers=num_workers), 0
    while seen < done:
        for _ in broken:
            seen += 1
            if seen == done:
                break
    resumed = loader(num_workers=num_workers)
    resumed.load_state_dict(json.loads(json.dumps(broken.state_dict())))
    broken.close()
    assert first_tokens(resumed) + first_tokens(resumed) == sequence[done : done + (8 - done % 8) + 8]
    resumed.close()


def test_no_random_number_of_torchs_own_is_used() -> None:
    before = torch.get_rng_state()
    first_tokens(loader())
    assert torch.equal(before, torch.get_rng_state())


# --- under Lightning ---------------------------------------------------------------------------------------------------------


class Learner(LightningModule):
    """One weight that every batch, and a random number, moves: its bits tell the whole history."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.seen: list[list[int]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(batch["input_ids"][:, 0].tolist())
        noise = torch.rand(4)
        return ((self.weight - batch["input_ids"].float().mean(0) / 50 - noise) ** 2).sum()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Loaders(LightningDataModule):
    """Loaders as ``TextDataModule`` makes them, over windows made here."""

    def __init__(self, num_workers: int) -> None:
        super().__init__()
        self.num_workers = num_workers

    train_dataloader = TextDataModule.train_dataloader
    val_dataloader = TextDataModule.val_dataloader
    streaming, batch_size, seed = False, 3, 5
    windows = {
        "train": Windows(torch.arange(WINDOWS * 4, dtype=torch.int32), 4, 0),
        "val": Windows(torch.arange(20, dtype=torch.int32), 4, 0),
    }


class SaveAt(Callback):
    """Saves a checkpoint, and torch's random state, behind the batches given."""

    def __init__(self, folder: Path, batches: set[int]) -> None:
        self.folder, self.batches, self.count = folder, batches, 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.count += 1
        if self.count in self.batches:
            trainer.save_checkpoint(self.folder / f"{self.count}.ckpt")
            torch.save(torch.get_rng_state(), self.folder / f"{self.count}.rng")


class Restore(Callback):
    """Puts the random state back before the first batch; that is not the loader's work."""

    def __init__(self, state: Tensor) -> None:
        self.state = state

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.set_rng_state(self.state)


def fit(folder: Path, flags: dict[str, Any], callback: Callback, checkpoint: Path | None = None, num_workers: int = 0) -> Learner:
    torch.manual_seed(0)
    learner = Learner()
    trainer = Trainer(
        **flags, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        num_sanity_val_steps=0, callbacks=[callback], default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(learner, datamodule=Loaders(num_workers), ckpt_path=checkpoint, weights_only=False)
    return learner


FLAGS: dict[str, dict[str, Any]] = {
    "steps": {"max_steps": 11, "accumulate_grad_batches": 2, "val_check_interval": 3, "check_val_every_n_epoch": None},
    "epochs": {"max_epochs": 3, "accumulate_grad_batches": 2, "val_check_interval": 3},
    "plain": {"max_epochs": 3},
    "short": {"max_steps": 14, "limit_train_batches": 5, "check_val_every_n_epoch": None, "val_check_interval": 4},
}


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("name", FLAGS)
def test_a_resumed_run_trains_on_the_batches_of_an_unbroken_one(name: str, tmp_path: Path) -> None:
    flags = FLAGS[name]
    total = len(fit(tmp_path, flags, SaveAt(tmp_path, set())).seen)
    every = flags.get("accumulate_grad_batches", 1)
    epoch = flags.get("limit_train_batches", 8)
    stops = {stop for stop in range(1, total) if (stop % epoch) % every == 0}
    whole = fit(tmp_path, flags, SaveAt(tmp_path, stops))
    assert len(stops) > 3
    assert epoch in stops
    for stop in sorted(stops):
        resumed = fit(tmp_path, flags, Restore(torch.load(tmp_path / f"{stop}.rng")), tmp_path / f"{stop}.ckpt")
        assert resumed.seen == whole.seen[stop:], stop
        assert torch.equal(resumed.weight, whole.weight), stop


class SaveEnd(SaveAt):
    """Saves when the run has ended."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, set())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.batches.add(self.count + 1)
        self.on_train_batch_end(trainer, pl_module)


EXTENSIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "within an epoch": ({**FLAGS["steps"], "max_steps": 6}, {"max_steps": 13}),
    "in epochs": ({"max_epochs": 2}, {"max_epochs": 4}),
}


@pytest.mark.parametrize("name", EXTENSIONS)
def test_a_run_that_ended_and_is_made_longer_goes_on_as_a_longer_one_would(name: str, tmp_path: Path) -> None:
    flags, longer = EXTENSIONS[name]
    ended = fit(tmp_path, flags, SaveEnd(tmp_path)).seen
    whole = fit(tmp_path, {**flags, **longer}, Callback())
    number = len(ended) + 1
    resumed = fit(tmp_path, {**flags, **longer}, Restore(torch.load(tmp_path / f"{number}.rng")), tmp_path / f"{number}.ckpt")
    assert ended + resumed.seen == whole.seen
    assert torch.equal(resumed.weight, whole.weight)


def test_worker_processes_change_nothing_in_a_resumed_run(tmp_path: Path) -> None:
    flags = FLAGS["steps"]
    whole = fit(tmp_path, flags, SaveAt(tmp_path, {6}))
    resumed = fit(tmp_path, flags, Restore(torch.load(tmp_path / "6.rng")), tmp_path / "6.ckpt", num_workers=2)
    assert resumed.seen == whole.seen[6:]
    assert torch.equal(resumed.weight, whole.weight)


class Interrupt(Callback):
    """Breaks off in the middle of a batch, and saves then."""

    def __init__(self, path: Path, batch: int) -> None:
        self.path, self.batch, self.count = path, batch, 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.count += 1
        if self.count == self.batch:
            raise RuntimeError("broken off")

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


def test_a_batch_that_was_broken_off_is_trained_again(tmp_path: Path) -> None:
    flags = {"max_epochs": 2}
    whole = fit(tmp_path, flags, Callback())
    for batch in (1, 4, 9):
        path = tmp_path / f"{batch}.ckpt"
        with pytest.raises(RuntimeError, match="broken off"):
            fit(tmp_path, flags, Interrupt(path, batch))
        assert fit(tmp_path, flags, Callback(), path).seen == whole.seen[batch - 1 :], batch


class History(Callback):
    """Every batch, a checkpoint behind some."""

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every, self.seen = folder, every, []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch["input_ids"].tolist())
        if len(self.seen) % self.every == 0 and not list(self.folder.glob(f"{len(self.seen)}.ckpt")):
            trainer.save_checkpoint(self.folder / f"{len(self.seen)}.ckpt")


def fit_stream(path: Path, history: History, steps: int, checkpoint: Path | None = None, **flags: Any) -> list[Any]:
    data = TextDataModule(
        POCKET, source="dataset", path=str(path), streaming=True, shuffle_windows=5, sequence_length=4, batch_size=2, validation_fraction=0.4
    )
    trainer = Trainer(
        max_steps=steps, accumulate_grad_batches=2, val_check_interval=5, check_val_every_n_epoch=None, num_sanity_val_steps=0, accelerator="cpu",
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, callbacks=[history],
        default_root_dir=history.folder, **flags,
    )  # fmt: skip
    trainer.fit(Learner(), datamodule=data, ckpt_path=checkpoint, weights_only=False)
    assert trainer.global_step == steps
    return history.seen


@pytest.mark.parametrize("flags", [{}, {"limit_train_batches": 8}])
def test_a_resumed_run_over_a_stream_trains_on_the_batches_of_an_unbroken_one(flags: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"some words about {index}"}) + "\n" for index in range(12)))
    (tmp_path / "kept").mkdir()
    whole = fit_stream(path, History(tmp_path / "kept", 6), 16, **flags)
    assert len(whole) == 32
    assert len({json.dumps(batch) for batch in whole}) > 20, "passes differ"
    for done in (6, 12, 18, 24):
        resumed = fit_stream(path, History(tmp_path, 99), 16, tmp_path / "kept" / f"{done}.ckpt", **flags)
        assert resumed == whole[done:], done
    longer = fit_stream(path, History(tmp_path, 99), 20, tmp_path / "kept" / "30.ckpt", **flags)
    assert longer[:2] == whole[30:]
    assert len(longer) == 10
