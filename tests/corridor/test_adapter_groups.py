"""Every file of conf/adapter becomes an adapter that trains, on the pocket models, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from swarmtune.config import load_config, options, resolve_path
from swarmtune.swarm import Swarm
from swarmtune.train.library_keys import peft_config
from tests.harness import loopback, remote

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),  # torch, where SHiRA scatters its values
]
LLAMA = ("adaption_prompt", "prefix")
WORDS = {"trainable_tokens": ["adapter.token_indices=[5,6]"], "adalora": ["adapter.tinit=0", "adapter.tfinal=1"]}


@pytest.fixture(scope="module")
def pockets() -> Iterator[dict[str, tuple[Path, Swarm]]]:
    found = {}
    with ExitStack() as stack:
        for family in ("bloom", "llama"):
            path = Path(resolve_path(f"pkg://swarmtune/assets/pocket_{family}"))
            found[family] = (path, stack.enter_context(loopback(path, ["0:2", "2:4"])))
        yield found


@pytest.mark.parametrize("name", [name for name in options("adapter") if name != "saved"])
def test_every_adapter_group_lowers_the_loss_on_one_batch(pockets: dict[str, tuple[Path, Swarm]], tmp_path: Path, name: str) -> None:
    path, swarm = pockets["llama" if name in LLAMA else "bloom"]
    config = load_config(["recipe=lora_bloom", f"adapter={name}", *WORDS.get(name, [])])
    torch.manual_seed(0)
    model = remote(path, swarm, peft_config(config.adapter)).train()
    ids = torch.randint(5, 4000, (2, 12), generator=torch.Generator().manual_seed(1))
    ids[:, ::3] = 5  # among them a trained token
    optimizer = torch.optim.AdamW(model.adapter.parameters(), lr=3e-3)
    losses = []
    for step in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        model.adapter.after_step(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.adapter.save_pretrained(tmp_path / "saved")
    again = remote(path, swarm, str(tmp_path / "saved"))
    model.eval()
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
