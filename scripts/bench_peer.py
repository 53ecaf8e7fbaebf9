"""The other end of ``scripts/bench wire``: takes messages and sends some, through a p2p daemon of its own, until its standard input ends."""

from __future__ import annotations

import asyncio
import json
import os
import sys

import torch

from swarmtune.transport.hivemind import HivemindNode
from swarmtune.wire.codec import Message, decode, encode
from swarmtune.wire.frames import Encoded, Incoming

TAKE, GIVE = "take", "give"
_given: dict[int, torch.Tensor] = {}


async def answer(peer: str, incoming: Incoming) -> Encoded:
    """Nothing to whoever brings a tensor; to whoever asks for one, so many bytes."""
    message = decode(incoming)
    if message.kind == GIVE:
        size = int(message.fields["bytes"])
        tensor = _given.setdefault(size, torch.full((size // 4,), 0.5))
        return encode(Message("given", {}, {"hidden": tensor}))
    return encode(Message("taken", {"bytes": sum(tensor.nbytes for tensor in message.tensors.values())}))


async def main() -> None:
    """Say where, then serve."""
    node = HivemindNode()
    try:
        await node.start(["/ip4/127.0.0.1/tcp/0"])
        await node.serve(answer)
        print(json.dumps({"address": node.addresses[0], "daemon_pid": node.daemon_pid, "pid": os.getpid()}), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    finally:
        await node.close()


if __name__ == "__main__":
    asyncio.run(main())
