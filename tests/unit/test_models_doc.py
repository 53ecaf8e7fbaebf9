"""docs/models.md: written from the table that the parity test runs, and true of the models in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from swarmtune.repairs import NEUTRAL_VALUES
from swarmtune.skeleton import build_skeleton
from tests.architectures import ARCHITECTURES, REFUSED, TOKENS, Architecture, page

DOCS = Path(__file__).parents[2] / "docs"
WINDOWS = ("sliding_window", "window_size", "attention_window_size", "local_attention")
SINUSOIDS = ("XGLMSinusoidalPositionalEmbedding",)


def test_the_page_is_what_the_table_gives() -> None:
    assert (DOCS / "models.md").read_text() == page(), "run: python -m tests.architectures > docs/models.md"


def test_the_table_is_wide_and_names_each_model_once() -> None:
    names = [each.name for each in (*ARCHITECTURES, *REFUSED)]
    assert len(names) == len(set(names))
    assert [each.name for each in ARCHITECTURES] == sorted(each.name for each in ARCHITECTURES)
    assert len({each.model_type for each in ARCHITECTURES}) >= 30
    assert {"rotary", "alibi", "learned", "sinusoidal", "none"} == {each.positions for each in ARCHITECTURES}
    assert all(any(word in each.attention for each in ARCHITECTURES) for word in ("sliding window", "soft-capped", "state space", "linear"))
    assert sum(each.experts for each in ARCHITECTURES) >= 10


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda each: each.name)
def test_what_the_page_says_of_a_model_is_true_of_its_configuration(architecture: Architecture) -> None:
    config: Any = architecture.config()
    model = build_skeleton(config)
    names = [name for name, _ in model.named_parameters()]
    assert positions(model, config) == architecture.positions
    widths = [value for name in WINDOWS if isinstance(value := getattr(config, name, None), int)]
    types = set(getattr(config, "layer_types", None) or ())
    slides = bool(widths) and min(widths) < TOKENS and (not types or "sliding_attention" in types or "local" in types)
    assert ("sliding window" not in architecture.attention) or slides
    assert ("soft-capped" in architecture.attention) == (getattr(config, "attn_logit_softcapping", None) is not None)
    assert ("state space" in architecture.attention) == any(name.endswith(".A_log") and ".linear_attn." not in name for name in names)
    assert architecture.experts == any("expert" in name or "moe" in name for name in names)
    assert all(getattr(config, name) != value for name, value in NEUTRAL_VALUES.get(architecture.model_type, {}).items() if hasattr(config, name))


def positions(model: nn.Module, config: Any) -> str:
    """How a model tells positions apart, by its modules."""
    kinds = {type(module).__name__ for module in model.modules()}
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "alibi"
    if kinds & set(SINUSOIDS):
        return "sinusoidal"
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if len(tables) > 1:
        return "learned"
    buffers = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    return "rotary" if buffers & {"inv_freq", "embed_positions"} or any(name.endswith("_inv_freq") for name in buffers) else "none"
