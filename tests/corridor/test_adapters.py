"""Every PEFT type against itself run locally: fresh logits, loss, every gradient, export and import."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM

from swarmtune.adapters.tuners import PROMPT_LEARNING, REFUSED, TUNERS, check_supported
from swarmtune.errors import AdapterUnsupported, KwargError
from tests.adapter_cases import CASES, FAMILIES, Case
from tests.harness import batch, loopback, remote, same_bits, step, trainable

PAIRS = [(name, family) for name, case in CASES.items() for family in case.families]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),  # torch, where SHiRA scatters its values
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),  # PEFT's BOFT, on every machine without a compiler
]


def local(path: Path, config: PeftConfig, seed: int = 7) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT advises on merging, ties and missing compilers
        model = get_peft_model(base, copy.deepcopy(config)).eval()
    return aligned(model)


def aligned(model: PeftModel) -> PeftModel:
    """A checkpoint's own memory is not aligned, and some kernels give other last bits then."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def perturb(*models: Mapping[str, torch.Tensor]) -> None:
    """Move all values a little, the same way: fresh adapters leave many gradients at zero."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name in models[0]:
            change = torch.randn(models[0][name].shape, generator=generator) * 0.05
            for model in models:
                model[name].add_(change)


def near(expected: torch.Tensor, found: torch.Tensor, tolerance: float) -> bool:
    """Equal to the bit, or within ``tolerance`` of the norm."""
    if not tolerance:
        return torch.equal(expected, found)
    return bool((expected - found).norm() <= tolerance * expected.norm())


def inputs(case: Case, **options: Any) -> dict[str, torch.Tensor]:
    found = batch(**options)
    if case.kind == "MULTITASK_PROMPT_TUNING":
        found["task_ids"] = torch.tensor([0, 1, 1, 0])
    if case.kind == "CPT":
        found["input_type_mask"] = torch.ones_like(found["input_ids"])
    return found


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_fresh_logits_loss_and_every_gradient_equal_peft(models: dict[str, Path], name: str, family: str) -> None:
    case = CASES[name]
    expected = local(models[family], case.config(family))
    with loopback(models[family], ["0:1", "1:3", "3:4"]) as swarm:
        torch.manual_seed(7)
        model = remote(models[family], swarm, case.config(family))
        model.train(case.kind == "ADALORA")  # whose loss has a term of its own while it trains
        own = dict(model.adapter.named_parameters())
        assert list(own) == list(trainable(expected)), "the adapter has PEFT's names, in PEFT's order"
        assert all(torch.equal(value, own[key]) for key, value in trainable(expected).items()), "a fresh adapter has PEFT's values"
        padded = inputs(case, padding="left")
        assert near(expected(**padded).logits, model(**padded).logits, case.logits)
        perturb(trainable(expected), own)
        here, there = step(expected, padded), step(model, padded)
    assert near(here[0], there[0], case.logits)
    assert near(here[1], there[1], case.logits)
    assert list(here[2]) == list(there[2])
    for key, grad in here[2].items():
        assert near(grad, there[2][key], case.tolerance), key
    assert any(grad.norm() > 0 for grad in there[2].values())


@pytest.mark.parametrize(("name", "family"), [(name, family) for name, family in PAIRS if CASES[name].kind != "LILY"])
def test_four_micro_batches_over_one_span_equal_peft_within_1e_6_of_the_norm(models: dict[str, Path], name: str, family: str) -> None:
    case = CASES[name]
    expected = local(models[family], case.config(family))
    with loopback(models[family], ["0:4"], micro_batch_tokens=10) as swarm:
        torch.manual_seed(7)
        model = remote(models[family], swarm, case.config(family))
        model.train(case.kind == "ADALORA")
        perturb(trainable(expected), dict(model.adapter.named_parameters()))
        whole = inputs(case)
        here, there = step(expected, whole), step(model, whole)
    largest = max(grad.norm() for grad in here[2].values())
    off = [key for key, grad in here[2].items() if (grad - there[2][key]).norm() > 1e-6 * grad.norm() + 1e-8 * largest]
    if off:  # float32 itself may be this far from the truth
        exact = step(expected.double(), whole)[2]
        for key in off:
            theirs, ours = (here[2][key] - exact[key]).norm(), (there[2][key] - exact[key]).norm()
            assert ours <= 2 * theirs + 1e-6 * exact[key].norm() + 1e-7 * largest, key


def test_an_adapter_that_mixes_rows_is_not_cut_into_micro_batches(bloom: Path) -> None:
    with loopback(bloom, ["0:4"], micro_batch_tokens=10) as swarm:
        model = remote(bloom, swarm, CASES["lily"].config("bloom"))
        with pytest.raises(KwargError, match=r"mixes the rows of a batch.*micro_batch_tokens to at least 40"):
            model(**batch())
        model(**batch(rows=1))


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_exported_adapters_load_into_peft_and_back(models: dict[str, Path], tmp_path: Path, name: str, family: str) -> None:
    case = CASES[name]
    with loopback(models[family]) as swarm:
        torch.manual_seed(7)
        model = remote(models[family], swarm, case.config(family))
        perturb(dict(model.adapter.named_parameters()))
        model.adapter.save_pretrained(tmp_path / "here")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models[family]), tmp_path / "here").eval()
        whole = inputs(case)
        unlabelled = {key: value for key, value in whole.items() if key != "labels"}  # AdaLoRA cannot take them when PEFT loads it for inference
        assert near(aligned(loaded)(**unlabelled).logits, model(**unlabelled).logits, case.logits), "what is exported is the same adapter to PEFT"
        again = remote(models[family], swarm, str(tmp_path / "here"))
        assert near(again(**whole).logits, model(**whole).logits, case.logits), "and here"
        theirs = local(models[family], case.config(family), seed=8)
        perturb(trainable(theirs))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs.save_pretrained(tmp_path / "there")
        mine = remote(models[family], swarm, str(tmp_path / "there"))
        assert near(theirs(**unlabelled).logits, mine(**unlabelled).logits, case.logits), "what PEFT trained loads here"
        mine(**whole).loss.backward()
        assert any(parameter.grad is not None and parameter.grad.norm() > 0 for parameter in mine.adapter.parameters())


def test_saved_multitask_prompts_train_on_in_all_their_parts(bloom: Path, tmp_path: Path) -> None:
    case = CASES["multitask prompt tuning"]
    with loopback(bloom) as swarm:
        model = remote(bloom, swarm, case.config("bloom"))
        model.adapter.save_pretrained(tmp_path / "adapter")
        again = remote(bloom, swarm, str(tmp_path / "adapter"))
        assert [*dict(again.adapter.named_parameters())] == [*dict(model.adapter.named_parameters())]
        assert all(grad.norm() > 0 for grad in step(again, inputs(case))[2].values())


def test_every_type_of_this_peft_is_supported_or_refused_with_a_reason() -> None:
    """A PEFT release with a new type fails here until somebody has looked at it."""
    assert {str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING} == {*TUNERS, *PROMPT_LEARNING, *REFUSED}
    assert {case.kind for case in CASES.values()} == {*TUNERS, *PROMPT_LEARNING}
    assert peft.__version__


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_types_that_cannot_be_right_are_refused_by_name(kind: str) -> None:
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)].__new__(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)])
    config.peft_type = PeftType(kind)
    with pytest.raises(AdapterUnsupported, match=f"type {kind} are not supported, because"):
        check_supported(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_adalora_trains_as_peft_trains_it_and_moves_the_same_ranks(models: dict[str, Path], tmp_path: Path, family: str) -> None:
    case = CASES["adalora"]
    theirs = local(models[family], case.config(family))
    with loopback(models[family]) as swarm:
        torch.manual_seed(7)
        ours = remote(models[family], swarm, case.config(family)).train()
        optimizers = [torch.optim.AdamW(parameters, lr=1e-2) for parameters in (list(trainable(theirs).values()), list(ours.adapter.parameters()))]
        for number in range(10):
            losses = [model(**batch(seed=number)).loss for model in (theirs, ours)]
            assert torch.equal(*losses), "the loss has PEFT's orthogonality term"
            for loss, optimizer in zip(losses, optimizers, strict=True):
                loss.backward()
                optimizer.step()
            theirs.base_model.update_and_allocate(number)
            ours.adapter.after_step(number)
            for optimizer in optimizers:
                optimizer.zero_grad()
        assert torch.equal(ours.eval()(**batch()).logits, ours(**batch()).logits)
        tokens = ours(**batch()).logits[:, :-1].flatten(0, 1), batch()["labels"][:, 1:].flatten()
        assert torch.allclose(ours(**batch()).loss, torch.nn.functional.cross_entropy(*tokens)), "a validation's loss is one over tokens"
        assert same_bits(trainable(theirs), dict(ours.adapter.named_parameters()))
        assert theirs.peft_config["default"].rank_pattern == ours.adapter.config.rank_pattern is not None
        ours.adapter.save_pretrained(tmp_path / "ours")
        whole = {"input_ids": batch()["input_ids"]}
        again = remote(models[family], swarm, str(tmp_path / "ours"))
        assert sum(parameter.numel() for parameter in again.adapter.parameters()) < sum(parameter.numel() for parameter in ours.adapter.parameters())
        assert near(ours(**whole).logits, again(**whole).logits, 1e-6), "what was masked is gone, and nothing else"
        found = again(**whole).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of its own rank pattern
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models[family]), tmp_path / "ours").eval()
    assert torch.equal(aligned(loaded)(**whole).logits, found)


def test_adaloras_rule_goes_on_from_a_checkpoint(bloom: Path) -> None:
    config = CASES["adalora"].config("bloom")
    with loopback(bloom) as swarm:

        def run(steps: range, model: Any) -> None:
            for number in steps:
                model.zero_grad()
                model(**batch(seed=number)).loss.backward()
                with torch.no_grad():
                    for parameter in model.adapter.parameters():
                        parameter -= 0.05 * parameter.grad
                model.adapter.after_step(number)

        torch.manual_seed(7)
        whole = remote(bloom, swarm, config)
        run(range(8), whole)
        torch.manual_seed(7)
        first = remote(bloom, swarm, config)
        run(range(4), first)
        state, rule = copy.deepcopy(first.adapter.state_dict()), copy.deepcopy(first.adapter.rule_state())
        second = remote(bloom, swarm, config)
        second.adapter.load_state_dict(state)
        second.adapter.load_rule_state(rule)
        run(range(4, 8), second)
    assert same_bits(dict(whole.adapter.named_parameters()), dict(second.adapter.named_parameters()))
    assert whole.adapter.config.rank_pattern == second.adapter.config.rank_pattern
