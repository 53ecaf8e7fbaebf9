"""Masks that follow from the call: the same to the bit wherever they are computed again, and as good as random everywhere else."""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    DeftConfig,
    DeloraConfig,
    FrodConfig,
    GraloraConfig,
    HiraConfig,
    LoraConfig,
    MissConfig,
    PeftConfig,
    PsoftConfig,
    RandLoraConfig,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call

from servers import dropout as module
from servers.dropout import DropoutPlan, SeededDropout, active, keep_mask, seed_dropouts, site_keys

CPU = torch.device("cpu")
WORD = (1 << 32) - 1
SITE = "self_attn.q_proj.lora_dropout.default"


def mask(
    shape: tuple[int, ...] = (8, 128, 1024), p: float = 0.5, *, seed: int = 7, first_row: int = 0, block: int = 3, site: str = SITE, call: int = 0
) -> Tensor:
    """Which elements a site keeps, seen through its forward."""
    dropout = SeededDropout(p, block, site)
    with active([dropout], DropoutPlan(seed, first_row)):
        for _ in range(call + 1):
            output = dropout(torch.ones(shape))
    return output != 0


def correlation(a: Tensor, b: Tensor) -> float:
    """In standard errors of independent draws."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt() * math.sqrt(a.numel()))


def lowbias32(word: int) -> int:
    word ^= word >> 16
    word = word * 0x7FEB352D & WORD
    word ^= word >> 15
    word = word * 0x846CA68B & WORD
    return word ^ word >> 16


def reference(rows: int, lines: int, features: int, p: float, plan: DropoutPlan, block: int, site: str, call: int) -> list[bool]:
    """The docstring of the module in plain integers."""
    prefix = struct.pack("<QQQ", plan.seed, block, call) + site.encode()

    def words(message: bytes) -> tuple[int, ...]:
        return struct.unpack("<4I", hashlib.blake2b(message, digest_size=16, person=b"swarmtune/drop/1").digest())

    feature_word = words(prefix)[0]
    kept = []
    for row, line in itertools.product(range(rows), range(lines)):
        key = words(prefix + b"\0" + struct.pack("<Q", plan.first_row + row))
        a, b = (lowbias32(lowbias32(line + key[i] & WORD) ^ key[i + 2]) for i in (0, 1))
        for feature in range(features):
            value = a ^ lowbias32(feature + feature_word & WORD)
            value ^= value >> 16
            value = value * 0x7FEB352D + b & WORD
            value ^= value >> 15
            value = value * 0x846CA68B & WORD
            kept.append((value ^ 1 << 31) >= p * (1 << 32))
    return kept


@pytest.mark.parametrize("shape", [(3, 5, 37), (2, 1, 64), (1, 40, 7), (2, 3, 4, 5), (6, 33), (19,), ()])
@pytest.mark.parametrize("p", [1e-9, 0.1, 0.75, 1 - 1e-12])
def test_mask_is_the_documented_function_of_integers_at_every_shape(shape: tuple[int, ...], p: float) -> None:
    plan = DropoutPlan(2**64 - 1, 2**32 - 1)
    rows = shape[0] if len(shape) > 2 else 1
    features = shape[-1] if shape else 1
    expected = reference(rows, math.prod(shape) // rows // features, features, p, plan, 79, SITE, 1)
    assert mask(shape, p, seed=plan.seed, first_row=plan.first_row, block=79, call=1).flatten().tolist() == expected


def test_chunks_do_not_change_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mask((3, 50, 33), 0.3)
    for size in (1, 33, 1000):
        monkeypatch.setattr(module, "_CHUNK_CPU", size)
        assert torch.equal(mask((3, 50, 33), 0.3), whole)


def test_threads_do_not_change_a_mask() -> None:
    threads = torch.get_num_threads()
    try:
        masks = []
        for count in (1, 2):
            torch.set_num_threads(count)
            masks.append(mask())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*masks)


def test_the_mask_of_a_released_version_never_changes() -> None:
    """A swarm mixes versions: these bits are part of the protocol."""
    bits = "".join(str(int(bit)) for bit in mask((2, 4, 8), 0.5).flatten().tolist())
    assert f"{int(bits, 2):016x}" == "c6270e7eb55fe8af"


def test_same_call_gives_the_same_bits_and_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    assert torch.equal(mask(), mask())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize(
    "other",
    [{"seed": 8}, {"seed": 7 + 2**32}, {"block": 4}, {"site": SITE.replace("q", "v")}, {"call": 1}, {"first_row": 1}, {"first_row": 8}],
    ids=lambda other: "-".join(f"{key}={value}" for key, value in other.items()),
)
def test_other_calls_have_uncorrelated_masks(p: float, other: dict[str, Any]) -> None:
    assert abs(correlation(mask(p=p), mask(p=p, **other))) < 5


def test_neighbouring_seeds_blocks_rows_and_calls_are_uncorrelated() -> None:
    families = [
        [mask((1, 64, 512), seed=seed) for seed in range(12)],
        [mask((1, 64, 512), block=block) for block in range(12)],
        [mask((1, 64, 512), call=call) for call in range(12)],
        list(mask((12, 64, 512))),
    ]
    for family in families:
        assert max(abs(correlation(a, b)) for a, b in itertools.combinations(family, 2)) < 5


@pytest.mark.parametrize("p", [0.05, 0.1, 0.25, 0.5, 0.75, 0.9])
def test_keep_rate_is_right_overall_and_of_each_row_line_and_feature(p: float) -> None:
    kept = mask(p=p).double()
    for axes, worst in (((0, 1, 2), 5), ((1, 2), 5), ((2,), 6), ((0, 1), 6)):
        means = kept.mean(axes)
        count = kept.numel() // means.numel()
        deviations = (means - (1 - p)) / math.sqrt(p * (1 - p) / count)
        assert deviations.abs().max() < worst
        if means.numel() > 1000:  # the spread is that of independent draws too, neither wider nor suspiciously even
            assert abs(deviations.square().mean() - 1) < 5 * math.sqrt(2 / means.numel())


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("shift", [(0, 0, 1), (0, 0, 2), (0, 0, 256), (0, 1, 0), (0, 64, 0), (1, 0, 0), (0, 1, 1)])
def test_neighbours_are_independent_by_chi_square(p: float, shift: tuple[int, int, int]) -> None:
    """2x2 tables of (element, its neighbour); one degree of freedom, whose value passes 27.5 once in 6 million."""
    kept = mask(p=p, seed=11)
    here = kept[tuple(slice(None, -step or None) for step in shift)]
    there = kept[tuple(slice(step, None) for step in shift)]
    statistic = 0.0
    for a, b in itertools.product((True, False), repeat=2):
        expected = (here == a).double().mean() * (there == b).double().mean() * here.numel()
        statistic += float((((here == a) & (there == b)).sum() - expected) ** 2 / expected)
    assert statistic < 27.5


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_have_no_structure_of_low_rank(p: float) -> None:
    """Lines and features are keyed apart: the products over rectangles vanish, and the largest singular value is that of independent draws."""
    signs = (mask((1, 1024, 1024), p)[0].double() - (1 - p)) / math.sqrt(p * (1 - p))
    squares = signs[:-1, :-1] * signs[1:, :-1] * signs[:-1, 1:] * signs[1:, 1:]
    assert abs(squares.sum()) < 5 * math.sqrt(squares.numel())
    assert torch.linalg.matrix_norm(signs, 2) < 1.03 * 2 * math.sqrt(1024)


def test_cutting_the_batch_changes_no_row() -> None:
    whole = mask((6, 5, 16), first_row=2)
    for sizes in ([6], [1] * 6, [2, 4], [5, 1]):
        starts = itertools.accumulate([0, *sizes[:-1]])
        parts = [mask((size, 5, 16), first_row=2 + start) for start, size in zip(starts, sizes, strict=True)]
        assert torch.equal(torch.cat(parts), whole)


def test_padding_on_the_right_changes_no_mask() -> None:
    assert torch.equal(mask((3, 9, 16))[:, :5], mask((3, 5, 16)))


def test_flattened_tokens_are_one_row() -> None:
    assert torch.equal(mask((12, 16), first_row=4), mask((1, 12, 16), first_row=4)[0])
    assert not torch.equal(mask((12, 16), first_row=4), mask((12, 16), first_row=5))


def test_evaluation_is_the_identity_whatever_the_training_flag_says() -> None:
    dropout, x = SeededDropout(0.5, 0, SITE).train(), torch.randn(2, 3, 4)
    assert dropout(x) is x
    with active([dropout], None):
        assert dropout(x) is x


def test_plan_ends_with_its_call_also_when_the_call_fails() -> None:
    dropout, x = SeededDropout(0.5, 0, SITE).eval(), torch.randn(2, 3, 4)

    def call() -> None:
        with active([dropout], DropoutPlan(1)):
            assert dropout(x) is not x
            assert dropout.training
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        call()
    assert dropout(x) is x
    assert not dropout.training


def test_plans_do_not_nest() -> None:
    dropout = SeededDropout(0.5, 0, SITE)
    with active([dropout], DropoutPlan(1)):
        with pytest.raises(RuntimeError, match="active already"), active([dropout], DropoutPlan(2)):
            pass
        assert dropout.plan == DropoutPlan(1)


@pytest.mark.parametrize("shape", [(3, 4, 5), (4, 5), (0, 5)])
def test_p_of_zero_is_the_identity_and_p_of_one_gives_zeros(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    none, every = SeededDropout(0.0, 0, SITE), SeededDropout(1.0, 0, SITE)
    with active([none, every], DropoutPlan(1)):
        assert none(x) is x
        gone = every(x)
    assert torch.equal(gone, torch.zeros_like(gone))
    assert torch.equal(torch.autograd.grad(gone.sum(), x)[0], torch.zeros_like(x))


@pytest.mark.parametrize(
    "make", [lambda: SeededDropout(1.5, 0, SITE), lambda: SeededDropout(-0.1, 0, SITE), lambda: SeededDropout(math.nan, 0, SITE)]
)
def test_what_is_no_probability_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        make()


@pytest.mark.parametrize("fields", [{"seed": -1}, {"seed": 2**64}, {"seed": 0, "first_row": -1}, {"seed": 0, "first_row": 2**32}])
def test_plan_out_of_range_is_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="from 0 to"):
        DropoutPlan(**fields)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_type_stays_and_kept_values_are_scaled_with_one_rounding(dtype: torch.dtype) -> None:
    x = torch.randn((4, 16, 64), generator=torch.Generator().manual_seed(1)).to(dtype)
    dropout = SeededDropout(0.3, 0, SITE)
    with active([dropout], DropoutPlan(1)):
        y = dropout(x)
    kept = keep_mask(site_keys(DropoutPlan(1), 0, SITE, 0, 4), 16, 64, 0.3, CPU).view(x.shape)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert y.dtype == dtype
    assert torch.equal(y[kept], (x[kept].to(wide) * (1 / 0.7)).to(dtype))
    assert not y[~kept].any()


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_mean_and_variance_are_those_of_torch(p: float) -> None:
    x = torch.randn((8, 128, 1024), generator=torch.Generator().manual_seed(1)) + 1
    dropout = SeededDropout(p, 0, SITE)
    with active([dropout], DropoutPlan(1)):
        ours = dropout(x).double()
    torch.manual_seed(1)
    theirs = torch.nn.functional.dropout(x, p).double()
    error = math.sqrt(2 * float(theirs.var()) / x.numel())
    assert abs(ours.mean() - theirs.mean()) < 5 * error
    fourth = float((theirs - theirs.mean()).pow(4).mean())
    assert abs(ours.var() - theirs.var()) < 5 * math.sqrt(2 * (fourth - float(theirs.var()) ** 2) / x.numel())


def test_layout_in_memory_does_not_matter() -> None:
    x = torch.randn(3, 5, 7)
    dropout = SeededDropout(0.5, 0, SITE)
    outputs = []
    for same in (x, x.transpose(0, 2).contiguous().transpose(0, 2)):
        with active([dropout], DropoutPlan(1)):
            outputs.append(dropout(same))
    assert torch.equal(*outputs)


def test_gradcheck() -> None:
    dropout = SeededDropout(0.4, 0, SITE)

    def call(x: Tensor) -> Tensor:
        with active([dropout], DropoutPlan(1)):
            return dropout(x) + dropout(x.sin())

    x = torch.randn((2, 3, 4), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x,))
    assert torch.autograd.gradgradcheck(call, (x,))


class Block(nn.Module):
    """A body with a dropout of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.drop = nn.Dropout(0.5)
        self.down = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(torch.nn.functional.gelu(self.up(x))))


class Body(nn.Module):
    """Two blocks, as PEFT wants a model."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


TARGETS: dict[str, Any] = {"target_modules": ["up", "down"]}
P = 0.3
SEEDABLE: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=4, lora_dropout=P, **TARGETS),
    "dora": LoraConfig(r=4, lora_dropout=P, use_dora=True, **TARGETS),
    "adalora": AdaLoraConfig(init_r=4, lora_dropout=P, total_step=10, **TARGETS),
    "deft": DeftConfig(r=4, deft_dropout=P, **TARGETS),
    "delora": DeloraConfig(r=4, module_dropout=P, **TARGETS),
    "frod": FrodConfig(frod_dropout=P, **TARGETS),
    "gralora": GraloraConfig(r=4, hybrid_r=2, gralora_k=2, gralora_dropout=P, **TARGETS),
    "hira": HiraConfig(r=4, hira_dropout=P, **TARGETS),
    "miss": MissConfig(r=4, miss_dropout=P, **TARGETS),
    "psoft": PsoftConfig(r=4, psoft_dropout=P, **TARGETS),
    "randlora": RandLoraConfig(r=4, randlora_dropout=P, **TARGETS),
    "tinylora": TinyLoraConfig(r=2, tinylora_dropout=P, **TARGETS),
    "unilora": UniLoraConfig(r=4, theta_d_length=64, unilora_dropout=P, **TARGETS),
    "vblora": VBLoRAConfig(r=4, vector_length=16, num_vectors=8, vblora_dropout=P, **TARGETS),
    "vera": VeraConfig(r=4, vera_dropout=P, **TARGETS),
}


def tuned(config: PeftConfig) -> tuple[nn.Module, list[SeededDropout], dict[str, Tensor]]:
    """A body in eval mode with seeded dropouts in its blocks (absolute numbers from 4), and leaves for all that learns."""
    torch.manual_seed(0)
    body = get_peft_model(Body(), config).base_model.model.eval().requires_grad_(False)
    dropouts = [dropout for number, layer in enumerate(body.layers) for dropout in seed_dropouts(layer, 4 + number)]
    plain = {name for name, _ in Body().named_parameters()}
    leaves = {
        name: (parameter + 0.2 * torch.rand_like(parameter)).requires_grad_()
        for name, parameter in body.named_parameters()
        if name.replace(".base_layer", "") not in plain and parameter.is_floating_point()
    }
    assert leaves
    return body, dropouts, leaves


def gradients(body: nn.Module, dropouts: list[SeededDropout], leaves: dict[str, Tensor], x: Tensor, plan: DropoutPlan | None) -> list[Tensor]:
    """Output and gradients of one call."""
    with active(dropouts, plan):
        output = functional_call(body, dict(leaves), (x,))
    grads = torch.autograd.grad(output, [x, *leaves.values()], torch.cos(output.detach()), allow_unused=True)
    return [output.detach(), *(torch.zeros(0) if grad is None else grad for grad in grads)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SEEDABLE)
def test_tuner_drops_by_the_plan_and_recomputes_to_the_bit(kind: str) -> None:
    body, dropouts, leaves = tuned(SEEDABLE[kind])
    x = torch.randn((3, 5, 16), generator=torch.Generator().manual_seed(1), requires_grad=True)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = gradients(body, dropouts, leaves, x, DropoutPlan(1))
    torch.randn(100)
    again = gradients(body, dropouts, leaves, x, DropoutPlan(1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(dropout.calls >= 1 for dropout in dropouts)
    assert not torch.equal(first[0], gradients(body, dropouts, leaves, x, DropoutPlan(2))[0])
    evaluated = gradients(body, dropouts, leaves, x, None)
    assert not torch.equal(first[0], evaluated[0])
    torch.set_rng_state(state)
    gradients(body, dropouts, leaves, x, DropoutPlan(1))
    assert torch.equal(torch.get_rng_state(), state), "a tuner used torch's random state"
    assert not any(module.training for module in body.modules())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SEEDABLE)
def test_mean_over_seeds_of_a_tuner_goes_to_its_mean_under_torchs_dropout(kind: str) -> None:
    """The seeded tuner in an eval body computes what PEFT's own computes in training, on average and in spread."""
    body, dropouts, leaves = tuned(SEEDABLE[kind])
    x = torch.randn((3, 5, 16), generator=torch.Generator().manual_seed(1))
    values = {name: leaf.detach() for name, leaf in leaves.items()}
    ours, theirs = [], []
    for seed in range(300):
        with active(dropouts, DropoutPlan(seed)):
            ours.append(functional_call(body, dict(values), (x,)))
    torch.manual_seed(0)
    local = get_peft_model(Body(), SEEDABLE[kind]).base_model.model.eval()
    for layer in local.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.training = True
    for name, layer in local.named_modules():
        layer.training |= isinstance(layer, nn.Dropout) and not name.endswith("layers.0.drop") and not name.endswith("layers.1.drop")
    for _ in range(300):
        theirs.append(functional_call(local, dict(values), (x,)))
    ours_S, theirs_S = torch.stack(ours).detach(), torch.stack(theirs).detach()
    error = ((ours_S.var(0) + theirs_S.var(0)) / 300).sqrt()
    assert ((ours_S.mean(0) - theirs_S.mean(0)).abs() < 6 * error + 1e-5).all()
    ratio = ours_S.var(0).mean() / theirs_S.var(0).mean()
    assert 0.8 < ratio < 1.25


def test_lora_output_is_the_formula_with_the_mask_of_the_site() -> None:
    body, dropouts, _ = tuned(SEEDABLE["lora"])
    layer = body.layers[1].up
    x = torch.randn((2, 5, 16))
    kept = keep_mask(site_keys(DropoutPlan(9, 3), 5, "up.lora_dropout.default", 0, 2), 5, 16, P, CPU).view(x.shape)
    with torch.no_grad():
        layer.lora_B.default.weight.copy_(torch.randn(32, 4))
        with active(dropouts, DropoutPlan(9, 3)):
            output = layer(x)
        expected = layer.base_layer(x) + layer.lora_B.default(layer.lora_A.default(x * kept * (1 / (1 - P)))) * layer.scaling["default"]
    assert torch.equal(output, expected)


def test_sites_are_named_within_the_block_and_the_body_keeps_its_dropout() -> None:
    body, dropouts, _ = tuned(SEEDABLE["lora"])
    assert [(dropout.block, dropout.site) for dropout in dropouts] == [
        (block, f"{name}.lora_dropout.default") for block in (4, 5) for name in ("up", "down")
    ]
    assert all(type(layer.drop) is nn.Dropout for layer in body.layers)
    assert type(body.layers[0].up.lora_dropout.default) is SeededDropout


def test_dropout_within_a_wrapped_layer_is_the_bodys() -> None:
    class Wrapping(nn.Module, BaseTunerLayer):
        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer
            self.own = nn.ModuleDict({"default": nn.Dropout(0.0)})
            self.shared = self.own["default"]
            self.other = nn.Dropout1d(0.2)

    inner = Wrapping(nn.Sequential(nn.Dropout(0.1)))
    layer = Wrapping(nn.Sequential(nn.Dropout(0.1), inner))
    dropouts = seed_dropouts(layer, 0)
    assert [dropout.site for dropout in dropouts] == ["shared", "base_layer.1.shared"]
    assert layer.shared is layer.own["default"] is dropouts[0]
    assert type(layer.base_layer[0]) is type(inner.base_layer[0]) is nn.Dropout
    assert type(layer.other) is nn.Dropout1d


def test_a_site_called_twice_in_one_call_drops_differently_each_time() -> None:
    dropout, x = SeededDropout(0.5, 0, SITE), torch.ones(2, 64, 64)
    passes = []
    for _ in range(2):
        with active([dropout], DropoutPlan(1)):
            passes.append((dropout(x), dropout(x)))
    assert abs(correlation(passes[0][0] != 0, passes[0][1] != 0)) < 5
    assert all(torch.equal(a, b) for a, b in zip(*passes, strict=True))
