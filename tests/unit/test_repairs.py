"""What surrounds layers becomes neutral by its kind, and what layers are given is compared to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GraniteConfig, RecurrentGemmaConfig

from swarmtune.errors import ModelUnsupported
from swarmtune.probe import Given, StandIn, as_output, carrier, first_difference
from swarmtune.repairs import NEUTRAL_VALUES, Absent, PassOn, ZeroPositions, neutralise
from swarmtune.skeleton import build_skeleton, check_identity, find_layers
from tests.architectures import ARCHITECTURES


class BareNorm(nn.Module):
    def forward(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(hidden_BTH, hidden_BTH.shape[-1:])


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.ones(4))

    def forward(self, hidden_BTH: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.inv_freq * position_ids[..., None]


class Sinusoids(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", torch.ones(16, 8))


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, input_ids: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None) -> torch.Tensor:
        return self.norm(inputs_embeds)


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = GraniteConfig()
        self.embedding_multiplier = 12.0
        self.layers = nn.ModuleList([nn.Linear(8, 8)])
        self.stem, self.positions, self.norm, self.bare = Stem(), nn.Embedding(16, 8), nn.LayerNorm(8), BareNorm()
        self.table, self.rotary = Sinusoids(), Rotary()


def test_what_surrounds_the_layers_is_made_neutral_by_its_kind_and_what_they_are_given_stays() -> None:
    parent = Parent()
    neutralise(parent, "layers", 8)
    kinds = {name: type(child) for name, child in parent.named_children()}
    assert kinds == {
        "layers": nn.ModuleList, "stem": PassOn, "positions": ZeroPositions, "norm": PassOn, "bare": PassOn, "table": ZeroPositions, "rotary": Rotary,
    }  # fmt: skip
    assert parent.embedding_multiplier == 1.0


def test_stand_ins_pass_hidden_states_on_or_add_nothing() -> None:
    hidden_BTH = torch.randn(2, 3, 8)
    assert PassOn()(hidden_BTH) is hidden_BTH
    assert PassOn()(input_ids=None, inputs_embeds=hidden_BTH) is hidden_BTH
    assert torch.equal(hidden_BTH + ZeroPositions()(torch.arange(3)), hidden_BTH)
    with pytest.raises(ModelUnsupported, match="asked to embed tokens"):
        Absent()(torch.arange(3))


def test_every_value_in_the_table_is_needed_and_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    tested = {each.model_type: each for each in ARCHITECTURES if each.model_type in NEUTRAL_VALUES}
    assert set(tested) >= {"granite", "granitemoe", "recurrent_gemma"}
    configs: dict[str, Any] = {name: each.config() for name, each in tested.items()}
    for config in configs.values():
        check_identity(config)
    monkeypatch.setattr("swarmtune.repairs.NEUTRAL_VALUES", {})
    for config in configs.values():
        with pytest.raises(ModelUnsupported, match="changes hidden states outside its layers"):
            check_identity(config)


def test_a_buffer_that_scales_embeddings_is_made_neutral_in_its_own_type() -> None:
    model = build_skeleton(
        RecurrentGemmaConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, vocab_size=64, lru_width=32, dtype="bfloat16")
    )
    parent = model.get_submodule(find_layers(model).parent_name)
    neutralise(parent, "layers", 32)
    assert parent.normalizer.item() == 1.0
    assert parent.normalizer.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({}, None),
        ({"attention_mask": torch.zeros(2, 5)}, "attention_mask"),
        ({"attention_mask": torch.ones(2, 5).double()}, "attention_mask"),
        ({"attention_mask": None}, "attention_mask"),
        ({"position_embeddings": (torch.ones(3), torch.zeros(3))}, "position_embeddings"),
        ({0: 2}, "0"),
        ({"more": 1}, "arguments"),
    ],
)
def test_a_difference_in_what_a_layer_is_given_is_named(change: dict[int | str, Any], difference: str | None) -> None:
    hidden_BTH = torch.ones(2, 5, 8)
    others: dict[int | str, Any] = {0: 1, "attention_mask": torch.ones(2, 5), "position_embeddings": (torch.ones(3), torch.ones(3)), "cache": None}
    assert first_difference([Given(hidden_BTH, others)], [Given(hidden_BTH.clone(), {**others, **change})]) == difference
    assert first_difference([Given(hidden_BTH, others)], [Given(hidden_BTH * 2, others)]) == "hidden states"
    assert first_difference([Given(hidden_BTH, others)], []) == "call"


@pytest.mark.parametrize(
    ("value", "carries"),
    [
        (torch.ones(2), False),
        (None, False),
        ((torch.ones(1), "text"), False),
        ({"full": torch.ones(1)}, False),
        ({}, True),
        ([], True),
        (object(), True),
    ],
)
def test_an_argument_in_which_layers_could_leave_something_is_named(value: object, carries: bool) -> None:
    assert carrier([Given(torch.ones(1), {"plain": 1, "shared": value})]) == ("shared" if carries else None)


def test_a_stand_in_keeps_what_it_was_given_and_says_what_the_layer_says() -> None:
    hidden_BTH, added_BTH = torch.ones(1, 2, 3), torch.full((1, 2, 3), 2.0)
    layer = StandIn({"block_type": "mamba"}, 2, added_BTH)
    output_BTH, rest = layer(hidden_BTH, 7, mask=None)
    assert layer.block_type == "mamba"
    assert torch.equal(output_BTH, hidden_BTH + added_BTH)
    assert rest is added_BTH
    assert layer.given[0].others == {0: 7, "mask": None}
    assert as_output(hidden_BTH, 0) is hidden_BTH
    assert as_output(hidden_BTH, 2) == (hidden_BTH, None)
