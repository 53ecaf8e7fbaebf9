"""A plain training loop over a swarm, and the same loop over quiet servers in this process: after each step their weights are compared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from swarmtune.errors import SwarmtuneError
from swarmtune.remote.pipeline import Pipelined
from swarmtune.swarm import Swarm
from tests.chaos.campaign import Campaign, Hang
from tests.harness import batch, loopback, lora, remote, save_tiny, set_values

SPANS = ("0:2", "2:4")
ROWS, TOKENS = 4, 10
MICRO_BATCH_TOKENS = 20
"""Two micro-batches a step, under way at once."""
BATCHES = 16
STEP_BOUND_S = 150.0
"""Patience is 30 s for each of the four pieces of a step, but a step that takes so long waits for nobody who will come."""
MAX_REPEATS = 3


class Training:
    """LoRA with dropout on a tiny BLOOM, AdamW, fixed batches. A step is a function of its number and the weights."""

    def __init__(self, path: Path, swarm: Swarm, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = remote(path, swarm, lora("bloom", lora_dropout=0.1)).train()
        self.seed = seed
        set_values([self.weights()], seed)
        self._pipelined = Pipelined(self.model)
        self._optimizer = torch.optim.AdamW(self.model.adapter.parameters(), lr=1e-3)

    def weights(self) -> dict[str, Tensor]:
        """What learns, by name."""
        return dict(self.model.adapter.named_parameters())

    def step(self, number: int, between: Callable[[], None] = lambda: None) -> None:
        """One optimizer step, every second one with forwards and backwards beside each other; else ``between`` is called between them."""
        torch.manual_seed(self.seed * 1_000_003 + number)  # dropout; so a step that failed can be repeated
        self._optimizer.zero_grad()
        given = batch(ROWS, TOKENS, seed=self.seed + number % BATCHES)
        loss = self._pipelined(given) if number % 2 else None
        loss = self.model(**given).loss if loss is None else loss
        between()
        loss.backward()
        self._optimizer.step()

    def probe(self) -> None:
        """A forward that nothing follows."""
        with torch.no_grad():
            self.model(**batch(ROWS, TOKENS, seed=self.seed))


class Pair:
    """The loud training and the quiet one, step by step."""

    def __init__(self, campaign: Campaign, loud: Training, quiet: Training) -> None:
        self.campaign, self.loud, self.quiet = campaign, loud, quiet

    def step(self, between: Callable[[], None] = lambda: None, bound_s: float = STEP_BOUND_S) -> None:
        """One step of both, compared. A loud step that fails is an error, and repeated."""
        campaign, number = self.campaign, self.campaign.steps
        self.quiet.step(number)
        for _ in range(MAX_REPEATS):
            try:
                with campaign.bound(f"step {number}", bound_s):
                    self.loud.step(number, between)
                break
            except SwarmtuneError as error:
                campaign.error(f"step {number}: {type(error).__name__}: {error}")
            except Hang:
                campaign.give_up_after_hangs()
        else:
            raise RuntimeError(f"step {number} failed {MAX_REPEATS} times")
        quiet = self.quiet.weights()
        campaign.compare(all(torch.equal(quiet[name], weight) for name, weight in self.loud.weights().items()))


def tiny_model(directory: Path) -> Path:
    """The model that campaigns train over: a BLOOM of four blocks."""
    torch.set_num_threads(1)  # as its servers; two cores are shared by many processes
    path = directory / "model"
    return path if (path / "config.json").exists() else save_tiny("bloom", path)


@contextlib.contextmanager
def pair(campaign: Campaign, path: Path, swarm: Swarm) -> Iterator[Pair]:
    """The training over ``swarm`` with a quiet one beside it."""
    with loopback(path, SPANS, micro_batch_tokens=MICRO_BATCH_TOKENS) as quiet:
        yield Pair(campaign, Training(path, swarm, campaign.seed), Training(path, quiet, campaign.seed))
