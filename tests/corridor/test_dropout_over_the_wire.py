"""Dropout of adapters inside remote blocks: which calls have it, and one mask for a step whoever computes it, how often, and in what pieces."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from servers.dropout import DropoutPlan, SeededDropout, active, seed_dropouts
from swarmtune import DeepPromptConfig
from swarmtune.adapters.tuners import TUNERS
from swarmtune.errors import AdapterUnsupported
from swarmtune.model import load_causal_lm
from tests.corridor.test_adapters import CASES, Case, near
from tests.harness import Faults, batch, loopback, lora, remote, same_bits, set_values, step, trainable, worst_difference

pytestmark = [pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension")]
P = 0.3
LAYERS = {"bloom": "transformer.h", "llama": "model.layers"}
DROPPING = {
    name: Case(case.kind, {**case.settings, str(TUNERS[case.kind].dropout): P}, case.targets, case.tolerance)
    for name, case in CASES.items()
    if case.kind in TUNERS and TUNERS[case.kind].dropout and case.kind != "PVERA" and name not in ("lora on stem and head", "supertuning")
}


def own(model: Any) -> dict[str, Tensor]:
    return dict(model.adapter.named_parameters())


def training(path: Path, swarm: Any, config: Any, **options: Any) -> Any:
    model = remote(path, swarm, config, **options)
    set_values([own(model)])
    return model.train()


def seeded_step(model: Any, inputs: dict[str, Tensor], seed: int = 5) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    torch.manual_seed(seed)
    return step(model, inputs)


def seeded_local(path: Path, config: PeftConfig, family: str) -> tuple[Any, list[SeededDropout]]:
    """A local PEFT model whose dropouts in the blocks are those that servers put there."""
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(path), copy.deepcopy(config)).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    layers = model.base_model.model.get_submodule(LAYERS[family])
    return model, [dropout for number, layer in enumerate(layers) for dropout in seed_dropouts(layer, number)]


def local_step(model: Any, dropouts: list[SeededDropout], inputs: dict[str, Tensor], seed: int = 5) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    torch.manual_seed(seed)
    with active(dropouts, DropoutPlan(int(torch.randint(1 << 62, ())))):
        return step(model, inputs)


@pytest.mark.parametrize("family", ["bloom", "llama"])
@pytest.mark.parametrize("name", DROPPING)
def test_a_step_with_dropout_equals_a_local_one_with_the_same_plan(models: dict[str, Path], name: str, family: str) -> None:
    """The backward is recomputed on the server, so equal gradients mean equal masks there."""
    case = DROPPING[name]
    config = case.config(family)
    local, dropouts = seeded_local(models[family], config, family)
    assert dropouts, "the tuner has sites"
    with loopback(models[family], ["0:1", "1:3", "3:4"]) as swarm:
        torch.manual_seed(7)
        model = remote(models[family], swarm, config)
        set_values([trainable(local), own(model)])
        quiet = step(model, batch(padding="left"))
        model.train()
        expected, found = local_step(local, dropouts, batch(padding="left")), seeded_step(model, batch(padding="left"))
    assert not torch.equal(quiet[0], found[0]), "something was dropped"
    assert torch.equal(expected[0], found[0])
    assert list(expected[2]) == list(found[2])
    assert all(near(grad, found[2][key], case.tolerance) for key, grad in expected[2].items())


def test_every_tuner_with_seeded_dropout_is_tested_here() -> None:
    assert {case.kind for case in DROPPING.values()} | {"PVERA"} == {kind for kind, tuner in TUNERS.items() if tuner.dropout}


def test_train_drops_and_eval_does_not_and_leaves_the_random_state_alone(bloom: Path) -> None:
    with loopback(bloom) as swarm:
        model, plain = remote(bloom, swarm, lora("bloom", lora_dropout=P)), remote(bloom, swarm, lora("bloom"))
        set_values([own(model), own(plain)])
        state = torch.get_rng_state()
        assert torch.equal(model(**batch()).logits, plain(**batch()).logits)
        assert torch.equal(torch.get_rng_state(), state)
        model.train()
        first, second = model(**batch()).logits, model(**batch()).logits
        assert not torch.equal(first, second), "each call draws a seed of its own"
        model.eval()
        assert torch.equal(model(**batch()).logits, plain(**batch()).logits)
        model.adapter.train()
        assert not torch.equal(model(**batch()).logits, plain(**batch()).logits)


def test_a_model_is_loaded_in_eval_mode_and_so_is_its_adapter(bloom: Path) -> None:
    with loopback(bloom) as swarm:
        model = load_causal_lm(str(bloom), swarm, adapter=lora("bloom", lora_dropout=P, target_modules=["query_key_value", "lm_head"]))
        assert not any(module.training for module in model.modules())
        set_values([own(model)])
        assert torch.equal(model(**batch()).logits, model(**batch()).logits)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_manual_seed_reproduces_a_step_to_the_bit_and_another_seed_does_not(bloom: Path, settings: dict[str, Any]) -> None:
    with loopback(bloom) as swarm:
        model = training(bloom, swarm, lora("bloom", lora_dropout=P, **settings))
        first, again, other = (seeded_step(model, batch(), seed) for seed in (5, 5, 6))
    assert torch.equal(first[0], again[0])
    assert same_bits(first[2], again[2])
    assert not torch.equal(first[0], other[0])


def test_calls_that_wait_for_their_backward_keep_their_own_masks(bloom: Path) -> None:
    with loopback(bloom) as swarm:
        model = training(bloom, swarm, lora("bloom", lora_dropout=P))
        parameters = list(own(model).values())
        alone = []
        for seed in (5, 6):
            torch.manual_seed(seed)
            alone.append(torch.autograd.grad(model(**batch()).loss, parameters))
        losses = []
        for seed in (5, 6):
            torch.manual_seed(seed)
            losses.append(model(**batch()).loss)
        late = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in reversed(losses)][::-1]
        twice = torch.autograd.grad(losses[0], parameters)
    for expected, found in zip(alone, late, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(alone[0], twice, strict=True))


@pytest.mark.parametrize("name", ["lora", "vblora"])
def test_the_gradient_is_that_of_the_masks_of_the_forward_by_finite_differences(models: dict[str, Path], name: str) -> None:
    """GPT-2 computes in float64 throughout, so a wrong mask in the recompute cannot hide. DoRA leaves its norm out of the gradient."""
    case = DROPPING[name]
    config = Case(case.kind, {**case.settings, "fan_in_fan_out": True}, {"gpt2": ["c_attn", "c_proj"]}).config("gpt2")
    inputs = {"input_ids": batch()["input_ids"]}
    with loopback(models["gpt2"], dtype=torch.float64, micro_batch_tokens=20) as swarm:
        model = training(models["gpt2"], swarm, config, dtype="float64")
        parameters = list(own(model).values())
        generator = torch.Generator().manual_seed(1)
        ways = [torch.randn(value.shape, generator=generator, dtype=value.dtype) for value in parameters]
        weights = torch.randn(4, 10, 96, generator=generator, dtype=torch.float64)

        def measure() -> Tensor:
            torch.manual_seed(5)
            found: Tensor = (model(**inputs).logits * weights).sum()
            return found.double()

        def move(distance: float) -> None:
            for value, way in zip(parameters, ways, strict=True):
                value.add_(distance * way)

        grads = torch.autograd.grad(measure(), parameters)
        slope = torch.stack([(grad.double() * way).sum() for grad, way in zip(grads, ways, strict=True)]).sum()
        with torch.no_grad():
            move(1e-5)
            above = measure()
            move(-2e-5)
            measured = (above - measure()) / 2e-5
    assert abs(measured - slope) <= 1e-6 * abs(slope)


ROUTES = {
    "one span": (["0:4"], Faults()),
    "other boundaries": (["0:1", "1:2", "2:4"], Faults()),
    "a death in forward": (["0:2", "2:4", "0:2", "2:4"], Faults(after={1})),
    "a death in backward": (["0:2", "2:4", "0:2", "2:4"], Faults(before={2})),
    "backward in pieces": (["0:4", "0:1", "1:3", "3:4"], Faults(before={1})),
}


@pytest.mark.parametrize("kind", ["lora", "dora", "adalora", "vblora"])
@pytest.mark.parametrize("route", ROUTES)
def test_masks_do_not_depend_on_who_computes_a_step(bloom: Path, kind: str, route: str) -> None:
    spans, faults = ROUTES[route]
    found = []
    for way, deaths in ((["0:2", "2:4"], Faults()), (spans, faults)):
        trouble = Faults()
        with loopback(bloom, way, faults=trouble) as swarm:
            torch.manual_seed(7)
            model = remote(bloom, swarm, DROPPING[kind].config("bloom"))
            set_values([own(model)])
            trouble.before, trouble.after, trouble.log = deaths.before, deaths.after, []
            found.append(seeded_step(model.train(), batch(padding="right")))
            assert swarm.traffic().retries >= len(deaths.before | deaths.after)
    assert torch.equal(found[0][0], found[1][0])
    assert same_bits(found[0][2], found[1][2])


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_four_micro_batches_have_the_masks_of_one(bloom: Path, settings: dict[str, Any], prompts: bool) -> None:
    config: Any = [lora("bloom", lora_dropout=P, **settings)] + [DeepPromptConfig(3)] * prompts
    found = []
    for tokens in (4096, 10 + 3 * prompts):
        with loopback(bloom, micro_batch_tokens=tokens) as swarm:
            torch.manual_seed(7)
            found.append(seeded_step(training(bloom, swarm, config), batch(padding="left")))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    assert worst_difference(found[0][2], found[1][2]) <= 2e-6


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_dropout_in_the_head_is_pefts_own_and_follows_the_mode_too(bloom: Path, settings: dict[str, Any]) -> None:
    config = lora("bloom", target_modules=["query_key_value", "lm_head"], lora_dropout=P, **settings)
    local, dropouts = seeded_local(bloom, config, "bloom")
    with loopback(bloom) as swarm:
        torch.manual_seed(7)
        model = remote(bloom, swarm, config)
        set_values([trainable(local), own(model)])
        quiet = step(model, batch())
        assert torch.equal(step(local, batch())[0], quiet[0])
        for module in local.modules():
            if isinstance(module, BaseTunerLayer) or type(module) is nn.Dropout:
                module.training = "lm_head" in {name for name, other in local.named_modules() if other is module}.pop()
        model.train()
        expected, found = local_step(local, dropouts, batch()), seeded_step(model, batch())
        again = seeded_step(model.eval(), batch())
    assert torch.equal(expected[0], found[0])
    assert same_bits(expected[2], found[2])
    assert torch.equal(quiet[0], again[0])


UNSEEDABLE = [
    ("loha", "rank_dropout"),
    ("loha", "module_dropout"),
    ("lokr", "rank_dropout"),
    ("lokr", "module_dropout"),
    ("oft", "module_dropout"),
    ("boft", "boft_dropout"),
]


@pytest.mark.parametrize(("name", "field"), UNSEEDABLE)
def test_dropout_that_cannot_be_seeded_is_refused_by_name(bloom: Path, name: str, field: str) -> None:
    config = CASES[name].config("bloom")
    setattr(config, field, 0.1)
    with loopback(bloom) as swarm:
        sentence = rf"{field}=0\.1 of {type(config).__name__} is not supported, because its mask comes from global random numbers .*: set {field}=0"
        with pytest.raises(AdapterUnsupported, match=sentence):
            remote(bloom, swarm, config)


def test_every_unseedable_dropout_is_tested_here() -> None:
    assert {(CASES[name].kind, field) for name, field in UNSEEDABLE} == {(kind, field) for kind, each in TUNERS.items() for field in each.unseedable}


def test_pvera_runs_and_refuses_to_train(bloom: Path) -> None:
    """In training mode PEFT samples its activations; without that a loss would go down and be another method's."""
    with loopback(bloom) as swarm:
        model = remote(bloom, swarm, CASES["pvera"].config("bloom"))
        assert torch.isfinite(model(**batch()).loss)
        model.train()
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(AdapterUnsupported, match="PVERA can be used and not trained through a swarm, because"):
                model(**batch())
        assert torch.isfinite(model.eval()(**batch()).loss)
