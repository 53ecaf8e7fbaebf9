"""Real servers that hold their blocks in int8 or nf4."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import IA3Config

import swarmtune
from swarmtune.errors import AdapterUnsupported, UsageError
from tests.harness import batch, loopback, lora, remote, same_bits, set_values, step

pytestmark = pytest.mark.swarm

POCKET = Path(swarmtune.__file__).parent / "assets" / "pocket_bloom"


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_a_step_over_quantised_servers_is_that_of_the_loopback_and_a_wrong_adapter_is_refused(tmp_path: Path, quantize: str) -> None:
    results = []
    with loopback(POCKET, dtype=torch.bfloat16, quantise=quantize) as swarm:
        results.append(one_step(swarm))
    with swarmtune.LocalSwarm(POCKET, ["0:2", "2:4"], quantize=quantize, threads=torch.get_num_threads(), log_dir=tmp_path) as local:
        with swarmtune.connect(local.initial_peers) as swarm:
            results.append(one_step(swarm))
            with pytest.raises(AdapterUnsupported, match=f"type IA3 are not known to be right over blocks held in {quantize}"):
                remote(POCKET, swarm, IA3Config(target_modules=["query_key_value"], feedforward_modules=[]))
    assert torch.equal(results[0][0], results[1][0])
    assert same_bits(results[0][2], results[1][2])
    log = (tmp_path / "server-0.log").read_text()
    assert "blocks 0:2 need about" in log
    assert f"weights are held in {quantize}: the largest error of a matrix is" in log
    assert f"in bfloat16 over {quantize} weights at /ip4" in log


def one_step(swarm: swarmtune.Swarm) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    model = remote(POCKET, swarm, lora("bloom"))
    set_values([dict(model.adapter.named_parameters())])
    return step(model, batch())


def test_a_model_that_cannot_be_quantised_is_refused_in_one_sentence(models: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=r"Conv1D keeps attn\.c_attn\.weight .* serve this model with quantize=none") as caught:
        with swarmtune.LocalSwarm(models["gpt2"], ["0:4"], quantize="int8"):
            pass
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="quantize must be one of none, int8, nf4, got 'int4'"):
        swarmtune.LocalSwarm(models["gpt2"], ["0:4"], quantize="int4")
