"""oneDNN's products in compiled code: where they stand for torch's own, that they are the same function, and when they are left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import BloomConfig

from servers import numeric, products
from servers.numeric import cpu_vendor
from servers.products import Products, faster

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")
aten = torch.ops.aten
OURS = torch.ops.swarmtune.product.default


@pytest.fixture(autouse=True)
def _asked_anew_and_of_any_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(products, "LEAST", 0)
    faster.cache_clear()
    yield
    faster.cache_clear()


def rewritten(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[torch.fx.GraphModule, list[object]]:
    module = make_fx(function, tracing_mode="fake")(*inputs)
    Products()(module.graph)
    module.graph.lint()
    module.recompile()
    return module, [node.target for node in module.graph.nodes if node.op == "call_function"]


def matrix(rows: int, columns: int, lies: str = "by rows", dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(rows * 1000 + columns)
    if lies == "by columns":
        return torch.randn(columns, rows, dtype=dtype).t()
    if lies == "every second":
        return torch.randn(rows, 2 * columns, dtype=dtype)[:, ::2]
    if lies == "one row, repeated":
        return torch.randn(1, columns, dtype=dtype).expand(rows, columns)
    return torch.randn(rows, columns, dtype=dtype)


def close(found: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> bool:
    """Measured by the product of the magnitudes, to which rounding is in proportion (Higham 2002, eq. 3.13), however much of it cancels."""
    exact, magnitude = function(*(each.double() for each in inputs)), function(*(each.double().abs() for each in inputs))
    return bool((found.double() - exact).norm() <= 2e-6 * magnitude.norm())


sizes = st.integers(1, 70)
layouts = st.sampled_from(["by rows", "by columns", "every second", "one row, repeated"])
biases: st.SearchStrategy[Callable[[int], Tensor] | None] = st.sampled_from(
    [
        None,
        torch.randn,
        lambda count: torch.randn(2 * count)[::2],
        lambda count: torch.randn(count, 3)[:, 1],
        lambda count: torch.randn(1).expand(count),
        lambda count: torch.randn(1),
    ]
)


@given(sizes, sizes, sizes, layouts, layouts, biases)
def test_a_product_is_the_same_function_for_all_shapes_and_strides(
    rows: int, inner: int, columns: int, x: str, w: str, bias: Callable[[int], Tensor] | None
) -> None:
    inputs = (matrix(rows, inner, x), matrix(inner, columns, w))
    if bias is not None:
        inputs = (bias(columns), *inputs)
    function = aten.mm.default if bias is None else aten.addmm.default
    module, targets = rewritten(function, *inputs)
    assert OURS in targets
    assert function not in targets
    found, torch_s = module(*inputs), function(*inputs)
    assert close(found, function, *inputs)
    assert (found.shape, found.stride(), found.dtype) == (torch_s.shape, torch_s.stride(), torch_s.dtype)


@pytest.mark.parametrize("lora", ["A", "B"])
def test_the_gradient_of_a_lora_matrix_takes_the_larger_factor_as_it_lies(lora: str) -> None:
    """A's is (T, r)^T (T, I), B's is (T, O)^T (T, r)."""
    small, large = matrix(32, 8), matrix(32, 3072)
    gradient, x = (small, large) if lora == "A" else (large, small)
    module, targets = rewritten(lambda g, x: aten.mm.default(aten.permute.default(g, [1, 0]), x), gradient, x)
    assert targets.count(OURS) == 1
    (node,) = [node for node in module.graph.nodes if node.target is OURS]
    assert node.args[1].meta["val"].shape == large.shape
    assert node.args[1].meta["val"].stride() == large.stride()
    assert close(module(gradient, x), lambda g, x: g.t() @ x, gradient, x)


def test_small_products_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LEAST", 4 * 5 * 6)
    assert OURS in rewritten(aten.mm.default, matrix(4, 5), matrix(5, 6))[1]
    monkeypatch.setattr(products, "LEAST", 4 * 5 * 6 + 1)
    assert OURS not in rewritten(aten.mm.default, matrix(4, 5), matrix(5, 6))[1]


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (aten.mm.default, (matrix(4, 5, dtype=torch.bfloat16), matrix(5, 6, dtype=torch.bfloat16))),
        (aten.mm.default, (matrix(4, 5, dtype=torch.float64), matrix(5, 6, dtype=torch.float64))),
        (aten.mm.default, (matrix(4, 5)[:0], matrix(5, 6))),
        (aten.addmm.default, (matrix(4, 6), matrix(4, 5), matrix(5, 6))),
        (lambda b, x, w: aten.addmm.default(b, x, w, beta=2), (torch.ones(6), matrix(4, 5), matrix(5, 6))),
        (aten.bmm.default, (torch.ones(2, 4, 5), torch.ones(2, 5, 6))),
    ],
)
def test_other_products_stay_with_torch(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    module, targets = rewritten(function, *inputs)
    assert OURS not in targets
    assert torch.equal(module(*inputs), function(*inputs))


def test_an_empty_sum_is_zero_whoever_computes_it() -> None:
    a, b = torch.ones(4, 0), torch.ones(0, 6)
    module, targets = rewritten(aten.mm.default, a, b)
    assert OURS not in targets
    assert torch.equal(module(a, b), torch.zeros(4, 6))


def test_other_cpus_and_a_torch_without_it_stay_with_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_rng_state()
    monkeypatch.setattr(products, "cpu_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    assert faster()
    assert torch.equal(torch.get_rng_state(), before)

    def broken(*_: object) -> Tensor:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    for name, value in (
        ("servers.products.cpu_vendor", lambda: "GenuineIntel"),
        ("servers.products.cpu_vendor", lambda: "unknown"),
        ("torch.backends.cpu.get_cpu_capability", lambda: "AVX2"),
        ("servers.products.onednn", lambda *_: torch.zeros(64, 64)),
        ("servers.products.onednn", broken),
    ):
        with monkeypatch.context() as patch:
            faster.cache_clear()
            patch.setattr(name, value)
            assert not faster()


@pytest.mark.parametrize(
    ("text", "vendor"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t: fpu\n", "AuthenticAMD"),
        ("processor\t: 0\nCPU implementer\t: 0x41\n", "0x41"),
        ("processor\t: 0\n", "unknown"),
        ("", "unknown"),
    ],
)
def test_the_make_of_the_cpu(text: str, vendor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_vendor.cache_clear()
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    try:
        assert cpu_vendor() == vendor
    finally:
        cpu_vendor.cache_clear()


def test_cpus_of_another_make_are_another_numeric_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """MKL takes other code on them, and gives other last digits."""
    found = []
    for vendor in ("GenuineIntel", "AuthenticAMD"):
        monkeypatch.setattr(numeric, "cpu_vendor", lambda vendor=vendor: vendor)
        found.append(numeric.cpu_hardware())
    assert found[0] != found[1]


@pytest.fixture
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*numeric.CPU_VARIABLES, *numeric.CUDA_VARIABLES):
        monkeypatch.delenv(name, raising=False)


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.usefixtures("_no_variables")
@pytest.mark.parametrize(
    ("device", "name"), [*((CPU, name) for name in numeric.CPU_VARIABLES), *((CUDA, name) for name in numeric.CUDA_VARIABLES)], ids=str
)
def test_variables_that_change_what_libraries_compute_are_another_numeric_class(
    device: torch.device, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H200")

    def facts() -> dict[str, str]:
        return numeric.numeric_facts(BloomConfig(), "m", torch.bfloat16, device)

    before = facts()
    for value, said in (("COMPATIBLE\n", "COMPATIBLE"), ("a\tb", "a b"), ("x" * 300, "x" * 199 + "…"), ("", None)):
        monkeypatch.setenv(name, value)
        assert facts() == (before if said is None else {**before, name: said}), "clients refuse what is long or cannot be printed"


def test_the_variables_of_each_library_are_known() -> None:
    assert {"MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "DNNL_CPU_ISA_HINTS"} < set(numeric.CPU_VARIABLES)
    assert {"NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG"} < set(numeric.CUDA_VARIABLES)
    assert set(numeric.EXACT) <= {*numeric.CPU_VARIABLES, *numeric.CUDA_VARIABLES}


@pytest.mark.usefixtures("_no_variables")
@pytest.mark.parametrize(
    ("device", "set_to", "refused"),
    [
        (CPU, {}, None),
        (CPU, {"ONEDNN_DEFAULT_FPMATH_MODE": "BF16"}, "ONEDNN_DEFAULT_FPMATH_MODE=BF16"),
        (CPU, {"DNNL_DEFAULT_FPMATH_MODE": "any"}, "DNNL_DEFAULT_FPMATH_MODE=any"),
        (CPU, {"DNNL_DEFAULT_FPMATH_MODE": "any", "ONEDNN_DEFAULT_FPMATH_MODE": "strict"}, None),
        (CPU, {"NVIDIA_TF32_OVERRIDE": "1", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "MKL_CBWR": "COMPATIBLE"}, None),
        (CUDA, {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1"),
        (CUDA, {"NVIDIA_TF32_OVERRIDE": "1"}, "NVIDIA_TF32_OVERRIDE=1"),
        (CUDA, {"NVIDIA_TF32_OVERRIDE": "0", "ONEDNN_DEFAULT_FPMATH_MODE": "BF16"}, None),
    ],
)
def test_float32_that_is_multiplied_in_a_shorter_type_is_named(
    device: torch.device, set_to: dict[str, str], refused: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in set_to.items():
        monkeypatch.setenv(name, value)
    assert numeric.shortened_products(torch.float32, device) == refused
    assert numeric.shortened_products(torch.bfloat16, device) is None
