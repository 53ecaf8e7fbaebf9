"""swarmtune: fine-tune a model too big for your machine; its frozen body runs on a swarm, all that learns stays with you.

Importing this package is light and starts nothing; each public name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swarmtune.adapters.parts import DeepPromptConfig, HeadConfig, StandInConfig
    from swarmtune.local_swarm import LocalSwarm
    from swarmtune.model import load_causal_lm, load_sequence_classifier, load_token_classifier
    from swarmtune.swarm import Swarm, connect
    from swarmtune.types import BlockSpan, Kwarg

__version__ = "0.2.0"

_HOMES = {
    "BlockSpan": "swarmtune.types",
    "DeepPromptConfig": "swarmtune.adapters.parts",
    "HeadConfig": "swarmtune.adapters.parts",
    "Kwarg": "swarmtune.types",
    "LocalSwarm": "swarmtune.local_swarm",
    "StandInConfig": "swarmtune.adapters.parts",
    "Swarm": "swarmtune.swarm",
    "connect": "swarmtune.swarm",
    "load_causal_lm": "swarmtune.model",
    "load_sequence_classifier": "swarmtune.model",
    "load_token_classifier": "swarmtune.model",
}
__all__ = [
    "BlockSpan",
    "DeepPromptConfig",
    "HeadConfig",
    "Kwarg",
    "LocalSwarm",
    "StandInConfig",
    "Swarm",
    "__version__",
    "connect",
    "load_causal_lm",
    "load_sequence_classifier",
    "load_token_classifier",
]


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'swarmtune' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
