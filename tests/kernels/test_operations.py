"""What holds for every operation: what is written in place, empty tensors, gradients, schemas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operation_arguments import BACK_ENDS, RIGHT, B, D, H, K, N, S, V, call, normal, targets

import megalite_kernels
from megalite_kernels import use_backend


@pytest.mark.parametrize("name", BACK_ENDS)
def test_a_leaf_is_not_turned_in_place(name: str) -> None:
    """As torch's operations in place refuse it."""
    leaf = RIGHT["rope_packed"]["qkv"]().requires_grad_()
    with use_backend(name):
        for qkv, whose in ((leaf, "a leaf"), (leaf.view(leaf.shape), "a view of a leaf")):
            with pytest.raises(RuntimeError, match=f"rope_packed: {whose} Variable that requires"):
                call("rope_packed", qkv=qkv)
        call("rope_packed", qkv=leaf, inplace=False)
        call("rope_packed", qkv=1 * leaf)
        with torch.no_grad():
            call("rope_packed", qkv=leaf)


@pytest.mark.parametrize("name", BACK_ENDS)
def test_who_kept_an_optimizer_s_buffer_is_told(name: str) -> None:
    buffers = {b: torch.rand(H) for b in ("master", "exp_avg", "exp_avg_sq", "copy", "gradient")}
    before = {b: x._version for b, x in buffers.items()}
    with use_backend(name):
        call("adamw_", **buffers)
    changed = {b for b, x in buffers.items() if x._version > before[b]}
    assert changed == {"master", "exp_avg", "exp_avg_sq", "copy"}


@pytest.mark.parametrize("name", BACK_ENDS)
def test_who_kept_a_buffer_that_an_optimizer_reads_is_not(name: str) -> None:
    buffers = {b: torch.rand(H) for b in ("master", "exp_avg", "exp_avg_sq", "gradient")}
    out = tuple(torch.rand(H) for _ in range(3))
    before = [x._version for x in (*buffers.values(), *out)]
    with use_backend(name):
        call("adamw_", **buffers, out=out)
    changed = [x._version > b for x, b in zip((*buffers.values(), *out), before, strict=True)]
    assert changed == [False] * 4 + [True] * 3


EMPTY: dict[str, list[dict[str, Any]]] = {
    "rms_norm": [dict(x=normal(0, H)), dict(x=normal(S, 0, H))],
    "add_rms_norm": [{name: normal(S, 0, H) for name in ("x", "residual")}],
    "rope": [
        dict(q=normal(S, 0, N, D), k=normal(S, 0, K, D)),
        dict(q=normal(0, B, N, D), k=normal(0, B, K, D))
        | {name: normal(0, 1, 4) for name in ("cos", "sin")},
    ],
    "rope_packed": [dict(qkv=normal(S, 0, 64), inplace=inplace) for inplace in (False, True)],
    "softmax": [
        dict(x=normal(0, N, S, S), mask=normal(1, 1, S, S)),
        dict(x=normal(B, N, 0, S), mask=None),
        dict(x=normal(B, N, S, 0), mask=normal(S, 0)),
        dict(x=normal(0), mask=None, causal=False),
    ],
    "swiglu": [dict(gate_up=normal(0, 2 * H)), dict(gate_up=normal(S, 0, 2 * H))],
    "cross_entropy": [dict(logits=normal(S, 0, V), targets=targets(S, 0))],
    "cross_entropy_with_grad": [
        dict(logits=normal(S, 0, V), targets=targets(S, 0), token_weight=normal(S, 0))
    ],
    "linear_cross_entropy": [
        dict(hidden=normal(S, 0, H), targets=targets(S, 0), token_weight=normal(S, 0))
    ],
    "vocab_parallel_statistics": [
        dict(logits=normal(0, V), targets=targets(0)),
        dict(logits=normal(S, 0), columns=0),
        dict(first_column=50, columns=0),
    ],
    "vocab_parallel_gradient_": [
        dict(logits=normal(0, V), targets=targets(0), log_sum=normal(0), gradient=normal(0)),
        dict(logits=normal(S, 0), columns=0),
        dict(first_column=50, columns=0),
    ],
    "adamw_": [
        {name: torch.rand(0) for name in ("master", "gradient", "exp_avg", "exp_avg_sq", "copy")}
    ],
}


@pytest.mark.parametrize(
    ("operation", "empty"), [(name, case) for name, cases in EMPTY.items() for case in cases]
)
def test_sizes_of_zero(operation: str, empty: dict[str, Any]) -> None:
    """Results and gradients have the shapes and the values that plain torch gives them."""
    assert set(EMPTY) == set(RIGHT)
    made = []
    for name in BACK_ENDS:
        torch.manual_seed(0)
        arguments = {key: make() for key, make in RIGHT[operation].items()} | empty
        leaf = arguments.get(next(key for key in empty if key not in ("targets", "columns")))
        differentiable = not operation.startswith(("vocab", "adamw"))
        with use_backend(name):
            if differentiable:
                leaf = leaf.detach().requires_grad_()
                arguments[next(iter(empty))] = 1 * leaf
            results = getattr(megalite_kernels, operation)(**arguments)
            results = (
                [] if results is None else [results] if torch.is_tensor(results) else [*results]
            )
            if differentiable:
                total = sum(y.sum() for y in results if y.requires_grad)
                results.append(torch.autograd.grad(total, leaf)[0])
        made.append(results)
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b)


TWICE = [
    ("triton", "rms_norm", "x"),
    ("triton", "add_rms_norm", "x"),
    ("triton", "cross_entropy", "logits"),
    *(
        (name, operation, argument)
        for name in BACK_ENDS
        for operation, argument in (
            ("rope", "q"),
            ("rope_packed", "qkv"),
            ("softmax", "x"),
            ("swiglu", "gate_up"),
            ("cross_entropy_with_grad", "logits"),
            ("linear_cross_entropy", "hidden"),
        )
    ),
]
"""Those that are not plain torch, whose gradients of gradients are torch's own."""


@pytest.mark.parametrize(("name", "operation", "argument"), TWICE)
def test_a_gradient_is_not_differentiated(name: str, operation: str, argument: str) -> None:
    """Better an error than what lacks the kernel's part."""
    leaf = RIGHT[operation][argument]().requires_grad_()
    factor = torch.ones((), requires_grad=True)
    with use_backend(name):
        results = call(operation, **{argument: 1 * leaf})
    result = results if torch.is_tensor(results) else results[0]
    (gradient,) = torch.autograd.grad((factor * result).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def operators() -> dict[str, tuple[Any, ...]]:
    """Arguments of every registered operator."""
    x, weight, rstd = normal(S, H), normal(H), torch.rand(S)
    q, k = normal(S, B, N, D), normal(S, B, K, D)
    tables = normal(S, B, D // 2), normal(S, B, D // 2)
    scores, mask = normal(B, N, S, S), torch.rand(B, 1, S, S) > 0.5
    logits, hits, tokens, sums = normal(S, V), targets(S), torch.rand(S), torch.rand(S).double()
    loss = (-100, 0.1, 0.1)
    flat = [torch.rand(H) for _ in range(4)]
    linear = (normal(S, H), normal(V, H), hits, tokens)
    return {
        "rms_norm_forward": (x.half(), weight, 1e-5, "llama"),
        "add_rms_norm_forward": (x.half(), x, weight, 1e-5, "fp32"),
        "rms_norm_backward": (x, None, x.t().contiguous().t(), weight, rstd, "gemma"),
        "mixed_add_rms_norm_backward": (x.half(), x, x, weight, rstd, "fp32"),
        "rope_turn": (q.transpose(0, 1).contiguous().transpose(0, 1), k, *tables, False, True),
        "rope_turn_packed": (q, None, k, *tables, True, False, N, K),
        "softmax_forward": (scores.transpose(2, 3), mask, 0.5, True),
        "softmax_backward": (scores.transpose(2, 3), scores, 0.5, False),
        "swiglu_forward": (normal(S, 2 * H),),
        "swiglu_backward": (normal(S, H), normal(S, 2 * H)),
        "losses_and_log_sums": (logits, hits, V - 1, *loss),
        "gradient_of_losses": (normal(V, S).t(), hits, sums, tokens, *loss),
        "loss_and_new_gradient": (normal(V, S).t(), hits, tokens, V - 1, *loss),
        "linear_loss_and_gradients": (*linear, None, True, True, 2, V, *loss),
        "vocab_parallel_statistics": (logits, hits, 0, V),
        "vocab_parallel_gradient": (logits, hits, sums, tokens, 0, V, V, 0.1, 0.1),
        "adamw_update": (
            *flat,
            *(normal(S) for _ in range(3)),
            torch.ones(1),
            None,
            torch.zeros(1),
            torch.ones(1),
            flat[0].half(),
            [0.5] * 6 + [-0.5] * 2,
            [0, 0],
        ),
    }


def test_every_operator_is_listed() -> None:
    registered = torch._C._dispatch_get_all_op_names()
    assert {f"megalite::{name}" for name in operators()} == {
        name for name in registered if name.startswith("megalite::")
    }


@pytest.mark.parametrize("name", operators())
def test_operators_do_what_their_schemas_say(name: str) -> None:
    """What is written to is named, nothing aliases, and shapes are known without running."""
    operator = getattr(torch.ops.megalite, name).default
    arguments = operators()[name]
    with use_backend("triton"):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
