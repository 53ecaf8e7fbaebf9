"""``scripts/chaos cuts``: streams are cut at any byte of our frames, in both directions; some are damaged, stalled or slowed down."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import Any

import swarmtune
from swarmtune.remote import route
from swarmtune.wire.frames import PREFIX, FrameKind
from tests.chaos.campaign import Campaign
from tests.chaos.proxy import Frame, FrameFault, attach
from tests.chaos.servers import CALL_TIMEOUT_S, START_BOUND_S
from tests.chaos.training import MICRO_BATCH_TOKENS, SPANS, pair, tiny_model

HEAD = (FrameKind.CALL, FrameKind.REPLY)
IN_A_MESSAGE = (*HEAD, FrameKind.DATA, FrameKind.END)
PLACES: dict[str, Callable[[Frame], tuple[int, int] | None]] = {
    # Where a cut may be, as the range of bytes of the frame that have passed; None where the frame is another one.
    "hello": lambda frame: (0, _size(frame)) if frame.kind is FrameKind.HELLO else None,
    "prefix": lambda frame: (1, PREFIX.size - 1) if frame.kind in IN_A_MESSAGE else None,
    "header": lambda frame: (PREFIX.size, _size(frame) - 1) if frame.kind in HEAD else None,
    "tensor": lambda frame: (PREFIX.size, _size(frame) - 1) if frame.kind is FrameKind.DATA else None,
    "between tensors": lambda frame: (0, 0) if frame.at_boundary else None,
    "before the trailer": lambda frame: (0, 0) if frame.kind is FrameKind.END else None,
    "trailer": lambda frame: (PREFIX.size, _size(frame) - 1) if frame.kind is FrameKind.END else None,
    "after the message": lambda frame: (_size(frame), _size(frame)) if frame.kind is FrameKind.END else None,
}
DAMAGE: dict[str, Callable[[Frame], tuple[int, int] | None]] = {
    "flip": lambda frame: (PREFIX.size, _size(frame) - 1) if frame.kind in IN_A_MESSAGE else None,
    "drop": lambda frame: (0, 0) if frame.kind is FrameKind.DATA else None,
    "trickle": lambda frame: (0, 0) if frame.kind in IN_A_MESSAGE else None,
    "stall": lambda frame: (0, _size(frame) - 1) if frame.kind in IN_A_MESSAGE else None,
}
SHARES = {"cut": 0.9, "flip": 0.03, "drop": 0.03, "trickle": 0.035, "stall": 0.005}
"""A stall costs seconds."""
MAX_SKIPPED = 3
MAX_PASSED = 40
"""Frames of the direction that do not fit, after which another fault is drawn."""
STALL_S = (0.3, 6.0)


def _size(frame: Frame) -> int:
    return PREFIX.size + frame.payload_bytes


class Shears:
    """Draws a fault, waits for a frame that it fits, makes it, and draws the next one. Runs on the loop thread."""

    def __init__(self, campaign: Campaign) -> None:
        self._campaign = campaign
        self.on = False
        self._draw()

    def _draw(self) -> None:
        random, self._passed = self._campaign.random, 0
        self._kind = random.choices(list(SHARES), list(SHARES.values()))[0]
        self._place = random.choice(list(PLACES)) if self._kind == "cut" else self._kind
        self._direction = random.choice(("up", "down"))
        self._skip = random.randrange(MAX_SKIPPED) if self._place != "hello" else 0

    def __call__(self, frame: Frame) -> FrameFault | None:
        """What happens to ``frame``."""
        if not self.on or frame.direction != self._direction:
            return None
        where = (PLACES if self._kind == "cut" else DAMAGE)[self._place](frame)
        if where is None:
            self._passed += 1
            if self._passed > MAX_PASSED:  # a hello comes only after a cut, so it could be waited for in vain
                self._draw()
            return None
        if self._skip:
            self._skip -= 1
            return None
        random = self._campaign.random
        offset, seconds = random.randint(*where), random.uniform(*STALL_S)
        fault = FrameFault(self._kind, offset, seconds if self._kind == "stall" else 0.0)
        name = f"cut {frame.direction}: {self._place}" if self._kind == "cut" else f"{self._kind} {frame.direction}"
        told = {"frame": frame.kind.name.lower(), "offset": offset, "of": _size(frame), "seconds": round(fault.seconds, 2)}
        self._campaign.fault(name, self._kind == "cut", **told)
        self._draw()
        return fault


def run(options: argparse.Namespace) -> int:
    """The campaign."""
    campaign = Campaign("cuts", options.count, options.seed, options.log)
    kept = route.FIRST_BAN_S
    route.FIRST_BAN_S = 0.0  # four servers fail thousands of times: the time for which one is left alone would be most of the campaign
    try:
        with campaign.running(), contextlib.ExitStack() as stack:
            path = tiny_model(options.log)
            with campaign.bound("the start of the servers", START_BOUND_S):
                spans = [span for span in SPANS for _ in range(2)]
                local = stack.enter_context(swarmtune.LocalSwarm(path, spans, dtype="float32", threads=1, log_dir=options.log))
                swarm = stack.enter_context(
                    swarmtune.connect(
                        local.initial_peers, micro_batch_tokens=MICRO_BATCH_TOKENS, call_timeout_s=CALL_TIMEOUT_S, history=campaign.history
                    )
                )
                shears, node = Shears(campaign), swarm._transport
                attach(node, shears)  # type: ignore[arg-type]
                both = stack.enter_context(pair(campaign, path, swarm))
            both.step()
            shears.on = True
            while campaign.counts["faults"] < campaign.wanted:
                both.step()
            shears.on = False
            both.step()
            campaign.facts |= facts(campaign, swarm)
    finally:
        route.FIRST_BAN_S = kept
    return campaign.finish()


def facts(campaign: Campaign, swarm: swarmtune.Swarm) -> dict[str, Any]:
    """Figures for the verdict."""
    dead = [server for server in swarm.traffic().servers if not server.calls]
    return {"retries": swarm.traffic().retries, "silent_truncations": len(campaign.different), "servers_never_asked": len(dead)}
