"""SwiGLU in Triton's interpreter, against its definition in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels import swiglu, use_backend

DTYPES = {torch.float32: 1e-5, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def relative(got: Tensor, exact: Tensor) -> float:
    if not exact.numel():
        return 0.0
    return ((got.double() - exact).abs() / exact.abs().amax(-1, keepdim=True)).max().item()


def exact(gate_up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    leaf = gate_up.detach().double().requires_grad_()
    gate, up = leaf.chunk(2, -1)
    y = F.silu(gate) * up
    return y.detach(), torch.autograd.grad(y, leaf, dy.double())[0]


def check(gate_up: Tensor, dy: Tensor, bound: float) -> None:
    gate_up = gate_up.detach().requires_grad_()
    with use_backend("triton"):
        y = swiglu(gate_up)
        (gradient,) = torch.autograd.grad(y, gate_up, dy)
    wanted_y, wanted_gradient = exact(gate_up, dy)
    assert y.is_contiguous() and y.dtype == gate_up.dtype == gradient.dtype
    assert y.shape == wanted_y.shape and gradient.shape == wanted_gradient.shape
    assert relative(y, wanted_y) < bound
    assert relative(gradient, wanted_gradient) < bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 5, 352, 1024, 2500, 8200, 14000])
def test_widths(width: int, dtype: torch.dtype) -> None:
    rows = 4 if width < 2000 else 2
    gate_up = 3 * torch.randn(rows, 2 * width)
    check(gate_up.to(dtype), torch.randn(rows, width).to(dtype), DTYPES[dtype])


@pytest.mark.parametrize("shape", [(0,), (7,), (2, 3), (2, 0, 3), (2, 1, 2)], ids=str)
def test_shapes(shape: tuple[int, ...]) -> None:
    check(torch.randn(*shape, 2 * 6), torch.randn(*shape, 6), 1e-5)


VIEWS = {
    "rows of a wider tensor": torch.randn(3, 4, 20)[..., 4:16],
    "every second row": torch.randn(6, 4, 12)[::2],
    "transposed rows": torch.randn(4, 3, 12).transpose(0, 1),
    "features apart": torch.randn(3, 12, 4).transpose(1, 2),
    "expanded": torch.randn(12).expand(3, 4, 12),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_any_strides(kind: str) -> None:
    check(VIEWS[kind], torch.randn(3, 4, 6), 1e-5)


@pytest.mark.parametrize("kind", ["apart", "expanded", "one number"])
def test_gradients_of_any_strides(kind: str) -> None:
    gradients = {
        "apart": torch.randn(3, 6, 4).transpose(1, 2),
        "expanded": torch.randn(3, 4, 1).expand(3, 4, 6),
        "one number": torch.ones(()).expand(3, 4, 6),
    }
    check(torch.randn(3, 4, 12), gradients[kind], 1e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("size", [1e-15, 1e2, 1e18])
def test_huge_and_tiny(size: float) -> None:
    check(size * torch.randn(4, 2 * 100), torch.randn(4, 100), 1e-5)


def test_only_the_input_is_kept() -> None:
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    gate_up = torch.randn(3, 12, requires_grad=True)
    for name in ("triton", "torch"):
        with (
            use_backend(name),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        ):
            swiglu(gate_up)
    assert [x.untyped_storage().data_ptr() for x in kept] == 2 * [gate_up.data_ptr()]


def test_compiled_without_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALITE_KERNELS", "triton")
    gate_up = torch.randn(3, 4, 12, requires_grad=True)
    compiled = torch.compile(swiglu, backend="aot_eager", fullgraph=True)
    with torch.profiler.profile() as profile:
        got = compiled(gate_up)
        gradients = [torch.autograd.grad(y.square().sum(), gate_up) for y in (got, swiglu(gate_up))]
    torch.testing.assert_close(got, swiglu(gate_up))
    torch.testing.assert_close(*gradients)
    called = {event.key for event in profile.key_averages()}
    assert {"megalite::swiglu_forward", "megalite::swiglu_backward"} <= called
