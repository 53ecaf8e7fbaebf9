"""The client of ``scripts/bench memory``: a line of addresses to connect to, then for each number so many training steps.

Each answer is its memory, and whether its peak is set back for the next one.
"""

from __future__ import annotations

import json
import sys

import torch
from bench_memory import set_back, status
from bench_model import lora, token_ids, trainer

import swarmtune


def main() -> None:
    """The words are path, rows, tokens of a row, tokens of a micro-batch, threads."""
    path, *numbers = sys.argv[1:]
    rows, sequence, micro_batch_tokens, threads = map(int, numbers)
    torch.set_num_threads(threads)
    addresses = sys.stdin.readline().strip()
    if not addresses:
        return
    with swarmtune.connect(addresses.split(","), micro_batch_tokens=micro_batch_tokens) as swarm:
        model = swarmtune.load_causal_lm(path, swarm, adapter=lora())
        step = trainer(model, token_ids(rows, sequence))
        held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in model.state_dict().values()}
        for line in sys.stdin:
            for _ in range(int(line)):
                step()
            print(json.dumps({**status(), "weights": sum(held.values()), "reset": set_back()}), flush=True)


if __name__ == "__main__":
    main()
