"""RMSNorm and residual add + RMSNorm on a GPU, against fp64 and beside torch's own operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megalite_kernels import add_rms_norm, reference, rms_norm
from megalite_kernels.fused import rms_norm as fused
from megalite_kernels.fused.rms_norm import Backward, launch_backward

EPS = 1e-5
OPERATIONS = {
    "rms_norm": (rms_norm, reference.rms_norm),
    "add_rms_norm": (add_rms_norm, reference.add_rms_norm),
}
SHAPES = [(4, 1024, 2048), (4096, 4096), (2048, 8192), (1024, 16384), (3000, 5120), (777, 1111)]


@pytest.fixture(autouse=True)
def _seeded(monkeypatch):
    monkeypatch.delenv("MEGALITE_KERNELS", raising=False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    torch.manual_seed(0)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def inputs_of(name: str, shape: tuple[int, ...], dtype: torch.dtype):
    """([x, residual, weight] or [x, weight], gradients of the results)."""
    count = 2 if name == "add_rms_norm" else 1
    inputs = [normal(*shape, dtype=dtype) for _ in range(count)]
    weight = 1 + 0.2 * normal(shape[-1])
    return [*inputs, weight.to(dtype)], [normal(*shape, dtype=dtype) for _ in range(count)]


def poison(tensors: list[Tensor]) -> None:
    """Leave NaN in the memory that the allocator hands out next."""
    buffers = [torch.full_like(x, torch.nan) for x in tensors for _ in range(3)]
    buffers.append(torch.full((528, tensors[0].shape[-1]), torch.nan, device="cuda"))
    del buffers


def run(operation: Callable, inputs: list[Tensor], grads: list[Tensor], *args: object):
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = operation(*leaves, EPS, *args)
    results = results if isinstance(results, tuple) else (results,)
    matching = [g.to(y.dtype) for g, y in zip(grads, results, strict=True)]
    return [y.detach() for y in results] + list(torch.autograd.grad(results, leaves, matching))


@pytest.mark.parametrize("casting", ["fp32", "llama", "gemma"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_bf16_is_as_near_to_fp64_as_torch(name: str, shape: tuple[int, ...], casting: str) -> None:
    ours, definition = OPERATIONS[name]
    inputs, grads = inputs_of(name, shape, torch.bfloat16)
    exact = run(definition, [x.double() for x in inputs], grads, casting)
    eager = run(definition, inputs, grads, casting)
    poison(inputs)
    got = run(ours, inputs, grads, casting)
    for a, b, c in zip(got, eager, exact, strict=True):
        mine, theirs = (a.double() - c).abs(), (b.double() - c).abs()
        assert mine.max() <= 1.1 * theirs.max()
        assert mine.square().mean().sqrt() <= 1.1 * theirs.square().mean().sqrt()


def check_relative(got: list[Tensor], exact: list[Tensor], bound: float) -> None:
    for a, c in zip(got, exact, strict=True):
        error = (a.double() - c).abs() / c.abs().amax(-1, keepdim=True)
        assert error.max() < bound


@pytest.mark.parametrize(
    "shape", [*SHAPES, (5000, 64), (1500, 256), (3000, 1024), (300, 32768), (280, 65536)]
)
@pytest.mark.parametrize("name", OPERATIONS)
def test_fp32(name: str, shape: tuple[int, ...]) -> None:
    ours, definition = OPERATIONS[name]
    inputs, grads = inputs_of(name, shape, torch.float32)
    exact = run(definition, [x.double() for x in inputs], grads)
    poison(inputs)
    check_relative(run(ours, inputs, grads), exact, 1e-5)


@pytest.mark.parametrize("name", OPERATIONS)
def test_fp16_and_mixed(name: str) -> None:
    ours, definition = OPERATIONS[name]
    for of_x, of_rest in [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ]:
        inputs, grads = inputs_of(name, (1000, 2048), of_x)
        inputs[1:] = [x.to(of_rest) for x in inputs[1:]]
        exact = run(definition, [x.double() for x in inputs], grads)
        poison(inputs)
        got = run(ours, inputs, grads)
        assert [x.dtype for x in got[-len(inputs) :]] == [x.dtype for x in inputs]
        check_relative(got, exact, 4e-3 if torch.float16 == of_x else 2e-2)


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_huge_and_tiny_values(size: float) -> None:
    inputs, grads = inputs_of("add_rms_norm", (500, 4096), torch.float32)
    inputs[:2] = [x * size for x in inputs[:2]]
    exact = run(reference.add_rms_norm, [x.double() for x in inputs], grads)
    check_relative(run(add_rms_norm, inputs, grads), exact, 1e-5)


def test_strides_and_zero_rows() -> None:
    packed = normal(64, 4, 3, 2048)
    x, residual = packed[:, :, 0], packed[:, :, 1].transpose(0, 1).contiguous().transpose(0, 1)
    weight, grads = normal(4096)[::2], [packed[:, :, 2], normal(1, 1, 1).expand_as(x)]
    exact = run(reference.add_rms_norm, [t.double() for t in (x, residual, weight)], grads)
    check_relative(run(add_rms_norm, [x, residual, weight], grads), exact, 1e-5)
    empty = normal(0, 4, 2048)
    got = run(add_rms_norm, [empty, empty, weight], [empty, empty])
    assert [t.shape for t in got] == [empty.shape] * 4 + [weight.shape]
    assert not got[-1].any()


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("hidden", [512, 2048, 16384])
def test_every_run_gives_the_same_bits(name: str, hidden: int) -> None:
    inputs, grads = inputs_of(name, (4096, hidden), torch.bfloat16)
    first = run(OPERATIONS[name][0], inputs, grads)
    for _ in range(3):
        poison(inputs)
        for a, b in zip(run(OPERATIONS[name][0], inputs, grads), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("hidden", [300, 2048, 16384])
def test_a_column_sum_that_starts_early_waits(monkeypatch: pytest.MonkeyPatch, hidden: int) -> None:
    x, dy = (normal(9000, hidden, dtype=torch.bfloat16) for _ in range(2))
    weight, rstd, dx = normal(hidden), normal(9000).exp(), torch.empty_like(x)
    given = (dy, None, x, weight, rstd, dx, None, "fp32", Backward(1, 16, 1, "ahead"))
    with monkeypatch.context() as patch:
        patch.setattr(fused, "can_start_early", lambda x: False)
        sums = [launch_backward(*given)]
    for _ in range(3):
        poison([x])
        sums.append(launch_backward(*given))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums.append(launch_backward(*given))
    graph.replay()
    assert all(torch.equal(sums[0], other) for other in sums[1:])


def test_mixed_dtypes_of_wide_rows() -> None:
    """A plan made for rows of one dtype has to hold them where another one is wider."""
    for hidden in (4096, 16384):
        for of_x, of_residual in [
            (torch.float32, torch.bfloat16),
            (torch.bfloat16, torch.float32),
        ]:
            inputs = [normal(400, hidden, dtype=of_x), normal(400, hidden, dtype=of_residual)]
            inputs.append(normal(hidden))
            leaves = [x.requires_grad_() for x in inputs]
            doubles = [x.detach().double().requires_grad_() for x in inputs]
            dy = normal(400, hidden, dtype=of_x)
            got = torch.autograd.grad(add_rms_norm(*leaves, EPS)[0], leaves, dy)
            exact = torch.autograd.grad(
                reference.add_rms_norm(*doubles, EPS)[0], doubles, dy.double()
            )
            check_relative(list(got), list(exact), 2e-2)


@pytest.mark.parametrize("hidden", [1024, 4096, 8192, 16384, 20000])
def test_a_weight_wider_than_the_rows(hidden: int) -> None:
    """It is kept or staged beside them, and has to fit too."""
    x, dy = normal(400, hidden, dtype=torch.bfloat16), normal(400, hidden, dtype=torch.bfloat16)
    leaves = [x.requires_grad_(), normal(hidden).requires_grad_()]
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    assert leaves[1].dtype == torch.float32
    got = torch.autograd.grad(rms_norm(*leaves, EPS), leaves, dy)
    exact = torch.autograd.grad(reference.rms_norm(*doubles, EPS), doubles, dy.double())
    check_relative(list(got), list(exact), 2e-2)


def layer(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, total = add_rms_norm(x, residual, weight, eps)
    return rms_norm(2 * y, weight, eps, "llama"), total


def test_compiled_in_one_graph() -> None:
    compiled = torch.compile(layer, fullgraph=True)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        inputs, grads = inputs_of("add_rms_norm", (512, 2048), dtype)
        exact = [x.double() for x in run(layer, inputs, grads)]
        check_relative(run(compiled, inputs, grads), exact, bound)


def test_captured_in_a_cuda_graph() -> None:
    inputs, grads = inputs_of("add_rms_norm", (1024, 4096), torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(layer, inputs, grads)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(layer, inputs, grads)
    for tensor in (*inputs, *grads):
        tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    for a, b in zip(captured, run(layer, inputs, grads), strict=True):
        assert torch.equal(a, b)


def test_more_than_two_to_the_31_elements() -> None:
    hidden = 16384
    rows = 2**31 // hidden + 5
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    x = torch.empty(rows, hidden, device="cuda", dtype=torch.bfloat16)
    dy = torch.empty_like(x)
    for tensor in (x, dy):
        for part in tensor.split(16384):
            part.normal_()
    weight = normal(hidden)
    y, dx, dweight = run(rms_norm, [x, weight], [dy])
    total = torch.zeros_like(weight, dtype=torch.float64)
    for part in (slice(rows // 2), slice(rows // 2, rows)):
        y_part, dx_part, dweight_part = run(rms_norm, [x[part], weight], [dy[part]])
        assert torch.equal(y[part], y_part) and torch.equal(dx[part], dx_part)
        total += dweight_part.double()
    check_relative([dweight], [total], 1e-5)


def test_add_more_than_two_to_the_31_elements() -> None:
    hidden = 16384
    rows = 2**31 // hidden + 5
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB")
    tensors = [torch.empty(rows, hidden, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    for tensor in tensors:
        for part in tensor.split(16384):
            part.normal_()
    x, residual, *grads = tensors
    weight = normal(hidden)
    *whole, dweight = run(add_rms_norm, [x, residual, weight], grads)
    total = torch.zeros_like(weight, dtype=torch.float64)
    for part in (slice(rows // 2), slice(rows // 2, rows)):
        inputs = [x[part], residual[part], weight]
        *parts, dweight_part = run(add_rms_norm, inputs, [grad[part] for grad in grads])
        assert all(torch.equal(a[part], b) for a, b in zip(whole, parts, strict=True))
        total += dweight_part.double()
    check_relative([dweight], [total], 1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_gpu_than_the_current_one() -> None:
    x, dy, weight = normal(64, 512), normal(64, 512), normal(512)
    want = run(rms_norm, [x, weight], [dy])
    got = run(rms_norm, [x.to("cuda:1"), weight.to("cuda:1")], [dy.to("cuda:1")])
    assert torch.cuda.current_device() == 0
    for a, b in zip(got, want, strict=True):
        assert a.device.index == 1 and torch.equal(a.cpu(), b.cpu())
