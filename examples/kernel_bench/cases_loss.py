"""Cases of the losses and of the optimizer.

Legend: T tokens, H hidden, V vocabulary, n parameters.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernel_bench.op import Floor, Op, normal, row_chunks
from kernel_bench.problem import BOTH, STEP, Expected, Problem

EVERYWHERE = slice(None)
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
STEPS_BEFORE = 10


def make_cross_entropy(
    size: tuple[int, ...], direction: str, device: torch.device, dtype: torch.dtype
) -> Problem:
    """Logits, targets; the loss is the mean over tokens."""
    tokens, vocabulary = size
    tensors = {
        "logits": normal(size, (device, dtype), 2.0),
        "targets": torch.randint(vocabulary, (tokens,), device=device),
        "token_weight": torch.full((tokens,), 1 / tokens, device=device),
    }
    return Problem("cross_entropy", direction, size, tensors, ("logits",))


def cross_entropy_floor(size: tuple[int, ...], _direction: str) -> Floor:
    """2 bytes read and 2 written a logit: the second read comes from registers or L2."""
    logits = size[0] * size[1]
    return Floor(2 * logits, 2 * logits)


def cross_entropy_reference(problem: Problem) -> Iterator[Expected]:
    """The mean loss; (softmax - onehot) / T."""
    logits, targets = problem.tensors["logits"], problem.tensors["targets"]
    tokens = logits.shape[0]
    losses = []
    for rows in row_chunks(*logits.shape):
        z = logits[rows].double()
        target = targets[rows, None]
        log_sum = z.logsumexp(-1, keepdim=True)
        losses.append(log_sum - z.gather(1, target))
        gradient = (z - log_sum).exp_() / tokens
        ones = torch.full_like(target, -1, dtype=gradient.dtype) / tokens
        yield 1, rows, gradient.scatter_add_(1, target, ones)
    yield 0, EVERYWHERE, torch.cat(losses).mean()


def make_linear(
    size: tuple[int, ...], direction: str, device: torch.device, dtype: torch.dtype
) -> Problem:
    """Hidden states and the output layer's weight, for logits of standard deviation 1."""
    tokens, hidden, vocabulary = size
    tensors = {
        "hidden": normal((tokens, hidden), (device, dtype)),
        "weight": normal((vocabulary, hidden), (device, dtype), hidden**-0.5),
        "targets": torch.randint(vocabulary, (tokens,), device=device),
        "token_weight": torch.full((tokens,), 1 / tokens, device=device),
    }
    return Problem("linear_cross_entropy", direction, size, tensors, ("hidden", "weight"))


def linear_floor(size: tuple[int, ...], _direction: str) -> Floor:
    """Inputs once, gradients once: far less than what the arithmetic takes."""
    tokens, hidden, vocabulary = size
    each = 2 * hidden * (tokens + vocabulary)
    return Floor(each, each)


def linear_reference(problem: Problem) -> Iterator[Expected]:
    """In fp32 on a GPU (fp64 is two orders from what bf16 can tell), in fp64 elsewhere."""
    tensors = problem.tensors
    wide = torch.float32 if tensors["hidden"].is_cuda else torch.float64
    weight, targets = tensors["weight"].to(wide), tensors["targets"]
    tokens = targets.shape[0]
    weight_gradient = torch.zeros_like(weight)
    losses = []
    for rows in row_chunks(tokens, weight.shape[0]):
        hidden, target = tensors["hidden"][rows].to(wide), targets[rows, None]
        z = hidden @ weight.t()
        log_sum = z.logsumexp(-1, keepdim=True)
        losses.append(log_sum - z.gather(1, target))
        gradient = (z - log_sum).exp_() / tokens
        ones = torch.full_like(target, -1, dtype=wide) / tokens
        gradient.scatter_add_(1, target, ones)
        yield 1, rows, gradient @ weight
        weight_gradient.addmm_(gradient.t(), hidden)
    yield 2, EVERYWHERE, weight_gradient
    yield 0, EVERYWHERE, torch.cat(losses).mean()


def make_adamw(
    size: tuple[int, ...], direction: str, device: torch.device, dtype: torch.dtype
) -> Problem:
    """Flat fp32 buffers, a clip factor, a copy in `dtype`.

    The weights are small beside one step's change, so that a wrong change shows in them.
    """
    like = (device, torch.float32)
    tensors = {
        "master": normal(size, like, 1e-2),
        "gradient": normal(size, like, 1e-2),
        "exp_avg": normal(size, like, 1e-2),
        "exp_avg_sq": normal(size, like, 1e-2).square_(),
        "copy": torch.zeros(size, device=device, dtype=dtype),
        "step": torch.full((), STEPS_BEFORE, device=device, dtype=torch.float32),
        "scale": torch.full((), 0.5, device=device),
    }
    return Problem("adamw", direction, size, tensors, options=HYPER)


def adamw_floor(size: tuple[int, ...], _direction: str) -> Floor:
    """16 bytes read a parameter; 12 written, and the copy's 2."""
    return Floor(16 * size[0], 14 * size[0])


def adamw_reference(problem: Problem) -> Iterator[Expected]:
    """Weights, both moments and the copy after the step."""
    at = {name: tensor.double() for name, tensor in problem.tensors.items()}
    beta1, beta2 = problem.options["beta1"], problem.options["beta2"]
    lr, decay = problem.options["lr"], problem.options["weight_decay"]
    gradient = at["gradient"] * at["scale"]
    step = STEPS_BEFORE + 1
    exp_avg = beta1 * at["exp_avg"] + (1 - beta1) * gradient
    exp_avg_sq = beta2 * at["exp_avg_sq"] + (1 - beta2) * gradient.square()
    root = (exp_avg_sq / (1 - beta2**step)).sqrt() + problem.options["eps"]
    master = at["master"] * (1 - lr * decay) - lr * exp_avg / (1 - beta1**step) / root
    for index, value in enumerate((master, exp_avg, exp_avg_sq, master)):
        yield index, EVERYWHERE, value


CROSS_ENTROPY = Op(
    name="cross_entropy",
    form="TOKENSxVOCABULARY",
    directions=(BOTH,),
    table=tuple((f"8192x{vocabulary}", (BOTH,)) for vocabulary in (32000, 128256, 151936)),
    sweep=tuple(f"{t}x{v}" for v in (32000, 128256, 151936) for t in (2048, 8192, 32768)),
    small="16x512",
    make=make_cross_entropy,
    floor=cross_entropy_floor,
    reference=cross_entropy_reference,
    outputs=1,
)

LINEAR = Op(
    name="linear_cross_entropy",
    form="TOKENSxHIDDENxVOCABULARY",
    directions=(BOTH,),
    table=(("8192x2048x32000", (BOTH,)), ("8192x4096x128256", (BOTH,))),
    sweep=("8192x2048x32000", "8192x4096x128256", "8192x4096x151936", "32768x2048x32000"),
    small="64x64x512",
    make=make_linear,
    floor=linear_floor,
    reference=linear_reference,
    outputs=1,
    tolerance=4e-2,  # Liger sums the weight's gradient in bf16
    flops=lambda size: 6.0 * size[0] * size[1] * size[2],
)

ADAMW = Op(
    name="adamw",
    form="PARAMETERS",
    directions=(STEP,),
    table=((str(1 << 30), (STEP,)),),
    sweep=tuple(str(1 << power) for power in (24, 27, 30)),
    small="4096",
    make=make_adamw,
    floor=adamw_floor,
    reference=adamw_reference,
    outputs=4,
    tolerance=3e-3,  # the copy's rounding
    check=lambda size: (min(size[0], 1 << 22),),
)

OPS = (CROSS_ENTROPY, LINEAR, ADAMW)
