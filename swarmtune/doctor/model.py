"""Which model the user means: its digest, number of blocks and width, from its configuration alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from swarmtune.doctor.check import Check, Status
from swarmtune.errors import ModelUnsupported, SwarmtuneError, UsageError

HUB_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What servers and clients must agree on.

    Attributes:
        digest: of the configuration.
        hidden: width of the hidden states.
    """

    digest: str
    num_blocks: int
    hidden: int


def find_model(model: str) -> tuple[list[Check], ModelFacts | None]:
    """The facts of a local directory or a hub id, with checks that say where they come from; ``None`` where they cannot be had.

    Raises:
        UsageError: a path that is no directory, or one without a configuration.
    """
    from swarmtune.weights import local_path

    checks = [] if local_path(model) is not None else [check_hub(model)]
    if any(check.status is Status.FAILED for check in checks):
        return checks, None
    from swarmtune.skeleton import check_identity, config_digest, hidden_size, load_config

    config = load_config(model)
    try:
        site = check_identity(config)
    except ModelUnsupported as error:
        return [*checks, Check("model", Status.FAILED, str(error), "choose another model")], None
    facts = ModelFacts(config_digest(config), site.num_blocks, hidden_size(config))
    found = f"{model} is {facts.digest}: {config.model_type}, {facts.num_blocks} blocks of width {facts.hidden}"
    return [*checks, Check("model", Status.OK, found)], facts


def check_hub(model: str) -> Check:
    """Whether the configuration of a hub id is here, or can be fetched from the hub in time."""
    import huggingface_hub
    from huggingface_hub import constants

    cached = huggingface_hub.try_to_load_from_cache(model, "config.json")
    if isinstance(cached, str):
        return Check("hub", Status.OK, f"{model} is in the cache, at {Path(cached).parent}")
    if constants.HF_HUB_OFFLINE:
        advice = "unset HF_HUB_OFFLINE, or give a local directory"
        return Check("hub", Status.FAILED, f"{model} is not in the cache, and HF_HUB_OFFLINE is set, so the hub is not asked", advice)
    try:
        within(HUB_TIMEOUT_S, lambda: huggingface_hub.hf_hub_download(model, "config.json", etag_timeout=HUB_TIMEOUT_S / 2))
    except (OSError, ValueError, SwarmtuneError) as error:
        advice = "check the id, the network, and for gated models the token (hf auth login); or give a local directory"
        return Check("hub", Status.FAILED, f"the hub does not give {model}: {' '.join(str(error).split())[:300]}", advice)
    return Check("hub", Status.OK, f"the hub gives {model}")


def within(timeout_s: float, work: Callable[[], object]) -> None:
    """Run ``work`` on a thread of its own, which ends with the process if it never returns.

    Raises:
        UsageError: it took longer than ``timeout_s``.
        Exception: what ``work`` raises.
    """
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except (OSError, ValueError) as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="swarmtune-hub", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise UsageError(f"no answer within {timeout_s:.0f} s")
    if failures:
        raise failures[0]
