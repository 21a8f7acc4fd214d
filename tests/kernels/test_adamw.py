"""AdamW in Triton's interpreter and in plain torch, against torch.optim.AdamW in fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from megalite_kernels import adamw_, use_backend

BACK_ENDS = ["triton", "torch"]
SIZE = 2100  # two programs and a bit


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@dataclass
class State:
    """Buffers of one optimizer, and what it does with a gradient."""

    master: Tensor
    exp_avg: Tensor = field(init=False)
    exp_avg_sq: Tensor = field(init=False)
    step: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.exp_avg, self.exp_avg_sq = (torch.zeros_like(self.master) for _ in range(2))
        self.step = torch.zeros(1)

    def update(self, gradient: Tensor, lr: float, **options: Tensor) -> None:
        self.step += 1
        buffers = (self.master, gradient, self.exp_avg, self.exp_avg_sq, self.step)
        numbers = dict(lr=lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
        adamw_(*buffers, **numbers, **options)

    def tensors(self) -> list[Tensor]:
        return [self.master, self.exp_avg, self.exp_avg_sq]


class Theirs:
    """torch.optim.AdamW."""

    def __init__(self, master: Tensor, **options: object):
        self.parameter = torch.nn.Parameter(master.clone())
        self.optimizer = torch.optim.AdamW(
            [self.parameter], lr=1.0, weight_decay=0.1, betas=(0.9, 0.999), **options
        )

    def update(self, gradient: Tensor, lr: float) -> None:
        self.parameter.grad = gradient.to(self.parameter.dtype)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def tensors(self) -> list[Tensor]:
        (state,) = self.optimizer.state.values()
        return [self.parameter.detach(), state["exp_avg"], state["exp_avg_sq"]]


def rate(step: int) -> float:
    return 1e-3 * (1 + math.sin(step / 10)) + 1e-5


@pytest.mark.parametrize("name", BACK_ENDS)
def test_a_hundred_steps_as_exact_as_torch(name: str) -> None:
    start, sizes = torch.randn(SIZE), 10.0 ** torch.linspace(-6, 2, SIZE)
    ours, theirs, exact = State(start.clone()), Theirs(start, fused=True), Theirs(start.double())
    # Errors of weights, first and second moments are relative to these.
    scales = [torch.ones(SIZE), sizes, sizes.square()]
    for step in range(100):
        gradient = torch.randn(SIZE) * sizes
        with use_backend(name):
            ours.update(gradient, rate(step))
        theirs.update(gradient, rate(step))
        exact.update(gradient, rate(step))
        if step in (0, 1, 99):
            states = (ours.tensors(), theirs.tensors(), exact.tensors())
            for mine, fused, right, scale in zip(*states, scales, strict=True):
                errors = [((x - right) / scale).square().mean().sqrt() for x in (mine, fused)]
                # The interpreter rounds products that a GPU adds to as they are.
                assert errors[0] <= 1.2 * errors[1]


@pytest.mark.parametrize("name", BACK_ENDS)
def test_fp64(name: str) -> None:
    """Served by plain torch, whatever the choice."""
    start = torch.randn(50, dtype=torch.float64)
    ours, exact = State(start.clone()), Theirs(start)
    for step in range(10):
        gradient = torch.randn(50, dtype=torch.float64)
        with use_backend(name):
            ours.update(gradient, rate(step))
        exact.update(gradient, rate(step))
    for a, b in zip(ours.tensors(), exact.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", BACK_ENDS)
def test_scale_and_copy(name: str, dtype: torch.dtype) -> None:
    start, gradient = torch.randn(SIZE), torch.randn(SIZE)
    scale = torch.tensor(0.37)
    copy = torch.full((SIZE,), torch.nan).to(dtype)
    ours, exact = State(start.clone()), Theirs(start.double())
    with use_backend(name):
        ours.update(gradient, 1e-2, scale=scale, copy=copy)
    exact.update(gradient.double() * scale.double(), 1e-2)
    for a, b in zip(ours.tensors(), exact.tensors(), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-7)
    if name == "torch" or dtype != torch.bfloat16:  # the interpreter rounds to bf16 otherwise
        assert torch.equal(copy, ours.master.to(dtype))
    torch.testing.assert_close(copy.float(), ours.master, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", BACK_ENDS)
def test_gradients_of_lower_precision(name: str) -> None:
    start, gradient = torch.randn(SIZE), torch.randn(SIZE).half()
    ours, exact = State(start.clone()), Theirs(start.double())
    with use_backend(name):
        ours.update(gradient, 1e-2)
    exact.update(gradient.double(), 1e-2)
    for a, b in zip(ours.tensors(), exact.tensors(), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("skip", [torch.ones(()), torch.ones(1), torch.tensor(torch.nan)], ids=str)
@pytest.mark.parametrize("name", BACK_ENDS)
def test_a_step_that_is_skipped_changes_nothing(name: str, skip: Tensor) -> None:
    ours = State(torch.randn(SIZE))
    copy = ours.master.half()
    with use_backend(name):
        ours.update(torch.randn(SIZE), 1e-2, copy=copy, skip=torch.zeros(()))
        before = [x.clone() for x in (*ours.tensors(), copy)]
        bad = torch.randn(SIZE)
        bad[::3] = torch.inf
        bad[1::3] = torch.nan
        ours.update(bad, 1e-2, scale=torch.tensor(torch.nan), skip=skip, copy=copy)
    assert all(torch.equal(a, b) for a, b in zip(before, (*ours.tensors(), copy), strict=True))


def numbers() -> dict[str, float]:
    return dict(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)


@dataclass
class Apart:
    """A state in the middle of a run, and where the next one goes, full of NaN."""

    dtype: torch.dtype
    copy_dtype: torch.dtype

    def __post_init__(self) -> None:
        def normal() -> Tensor:
            return torch.randn(SIZE, dtype=self.dtype)

        self.old = (normal(), normal(), normal().square())
        self.gradient, self.step = torch.randn(SIZE, dtype=self.dtype), torch.tensor(4.0)
        self.out = tuple(torch.full_like(x, torch.nan) for x in self.old)
        self.copy = torch.full((SIZE,), torch.nan, dtype=self.copy_dtype)

    def call(self, *, apart: bool, **flags: Tensor) -> list[Tensor]:
        """New w, m, v and copy, of a step to `out` or, on clones, in place."""
        w, m, v = self.old if apart else [x.clone() for x in self.old]
        out = self.out if apart else None
        copy = self.copy if apart else w.to(self.copy_dtype)
        adamw_(w, self.gradient, m, v, self.step, **numbers(), copy=copy, out=out, **flags)
        return [x.clone() for x in (*(self.out if apart else (w, m, v)), copy)]


DTYPES = [
    (torch.float32, torch.float16),  # the interpreter rounds to bf16 otherwise
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
]
SKIPS = [None, torch.zeros(()), torch.ones(1), torch.tensor(torch.nan)]


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("skip", SKIPS, ids=str)
@pytest.mark.parametrize(("dtype", "copy"), DTYPES, ids=str)
@pytest.mark.parametrize("name", BACK_ENDS)
def test_apart_it_is_bit_for_bit_what_it_is_in_place(
    name: str, dtype: torch.dtype, copy: torch.dtype, skip: Tensor | None
) -> None:
    """A step that is skipped writes the old state; the old buffers stay in any case."""
    state = Apart(dtype, copy)
    before = [x.clone() for x in state.old]
    flags = dict(scale=torch.tensor(0.37), **({} if skip is None else dict(skip=skip)))
    if skip is not None and skip != 0:
        state.gradient[::3], state.gradient[1::3] = torch.inf, torch.nan
    with use_backend(name):
        wanted = state.call(apart=False, **flags)
        found = state.call(apart=True, **flags)
    assert all(map(torch.equal, wanted, found))
    assert all(map(torch.equal, before, state.old))
    moved = skip is None or skip == 0
    assert moved != torch.equal(found[0], before[0])


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", BACK_ENDS)
def test_a_call_that_does_not_run_writes_nothing(
    name: str, dtype: torch.dtype, apart: bool
) -> None:
    state = Apart(dtype, torch.bfloat16)
    with use_backend(name):
        wanted = state.call(apart=apart)
        state.gradient.neg_()
        written = [x.clone() for x in (*state.out, state.copy)]
        for skip in (None, torch.zeros(1), torch.ones(1)):
            flags = {} if skip is None else dict(skip=skip)
            found = state.call(apart=apart, run=torch.zeros(1), **flags)
            still = written if apart else [*state.old, state.old[0].bfloat16()]
            assert all(map(torch.equal, still, found))
        # Any other number says that it runs.
        found = state.call(apart=apart, run=torch.full((), 0.5, dtype=torch.float64))
    assert not torch.equal(found[0], wanted[0])
    state.gradient.neg_()
    with use_backend(name):
        assert all(map(torch.equal, wanted, state.call(apart=apart, run=torch.ones(1))))


@pytest.mark.parametrize("name", BACK_ENDS)
def test_a_wrong_guess_is_amended_from_the_old_state(name: str) -> None:
    """A step to `out` with a wrong factor, and again with the right one."""
    state, factor = Apart(torch.float32, torch.bfloat16), torch.tensor(0.2)
    with use_backend(name):
        wanted = state.call(apart=False, scale=factor)
        state.call(apart=True, scale=torch.tensor(torch.nan))
        assert all(x.isnan().any() for x in (*state.out, state.copy))
        found = state.call(apart=True, scale=factor, run=torch.ones(()))
    assert all(map(torch.equal, wanted, found))


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1025, 2048, 2049])
def test_lengths(size: int) -> None:
    """A slice of a longer buffer; nothing beyond it is touched."""
    wide = torch.randn(size + 10)
    ours = State(wide[5 : size + 5])
    exact = Theirs(wide[5 : size + 5].double())
    around = wide[:5].clone(), wide[size + 5 :].clone()
    gradient = torch.randn(size)
    with use_backend("triton"):
        ours.update(gradient, 1e-2)
    exact.update(gradient, 1e-2)
    torch.testing.assert_close(ours.master.double(), exact.tensors()[0], rtol=1e-6, atol=1e-7)
    assert torch.equal(around[0], wide[:5]) and torch.equal(around[1], wide[size + 5 :])


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12, 1e15])
def test_huge_and_tiny(size: float) -> None:
    start, gradient = torch.randn(SIZE), size * torch.randn(SIZE)
    ours, exact = State(start.clone()), Theirs(start.double())
    for _ in range(3):
        with use_backend("triton"):
            ours.update(gradient, 1e-2)
        exact.update(gradient, 1e-2)
    torch.testing.assert_close(ours.master.double(), exact.tensors()[0], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.999, 0.9999999])
@pytest.mark.parametrize("count", [1, 2, 10, 1000, 100_000])
def test_bias_corrections(count: int, beta2: float) -> None:
    """With m = 0.1 and v = 1 the update says what they were."""
    master, one = torch.zeros(1), torch.ones(1)
    numbers = dict(lr=1.0, beta1=0.9, beta2=beta2, eps=0.0, weight_decay=0.0)
    with use_backend("triton"):
        # beta m + (1 - beta) g, with m and g alike, is m.
        adamw_(master, one, one.clone(), one.clone(), torch.tensor(float(count)), **numbers)
    wanted = -1 / (1 - 0.9**count) * math.sqrt(1 - beta2**count)
    assert master.item() == pytest.approx(wanted, rel=1e-6)


def test_compiled_without_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALITE_KERNELS", "triton")

    def run(state: State, gradient: Tensor, lr: float) -> None:
        buffers = (state.master, gradient, state.exp_avg, state.exp_avg_sq, state.step)
        numbers = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
        adamw_(*buffers, lr=lr, **numbers)

    states = [State(torch.ones(100)) for _ in range(2)]
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    with torch.profiler.profile() as profile:
        for lr in (1e-2, 2e-2, 3e-2):
            gradient = torch.randn(100)
            for state, call in zip(states, (run, compiled), strict=True):
                state.step += 1
                call(state, gradient, lr)
    for a, b in zip(*(state.tensors() for state in states), strict=True):
        assert torch.equal(a, b)
    assert "megalite::adamw_update" in {event.key for event in profile.key_averages()}
