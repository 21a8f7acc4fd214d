"""What the operations refuse, in the same words on both back ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operation_arguments import BACK_ENDS, RIGHT, B, D, H, K, N, S, V, call, normal, targets
from torch import Tensor

import megalite_kernels
from megalite_kernels import check, use_backend

INTEGERS = torch.ones(S, B, V, dtype=torch.int64)
NORMS = [
    (dict(x=torch.ones(S, H).long()), "x is torch.int64: it is floating; give float32"),
    (dict(x=normal(), weight=normal()), "x []: it is [..., H]"),
    (dict(x=normal(S, 0), weight=normal(0)), "x [3, 0]: it is [..., H]; H is at least 1"),
    (dict(weight=normal(4)), "weight [4] beside x [3, 6]: it has x's last dimension; give [6]"),
    (dict(weight=normal(1, H)), "weight [1, 6] beside x [3, 6]"),
    (dict(eps=-1e-5), "eps=-1e-05: it is finite and at least 0"),
    (dict(eps=torch.ones(())), "eps is a tensor: it is a number"),
    (dict(casting="half"), "'half' is not a casting: choose fp32, llama or gemma"),
]
TURNS = [
    (dict(cos=normal(S, 1, 3)), "cos torch.float32 [3, 1, 3] and sin torch.float32 [3, 1, 4]"),
    (dict(cos=normal(S, 1, 4).double()), "they are alike"),
    (
        {name: normal(S, 1, 4).half() for name in ("cos", "sin")},
        "cos and sin are torch.float16: they are not rounded; give float32",
    ),
    *(
        ({name: normal(*shape) for name in ("cos", "sin")}, message)
        for shape, message in (
            ((2, 1, 4), "[2, 1, 4]: they are [S, 1 or B, R/2]; give [3, 1 or 2, R/2]"),
            ((S, 3, 4), "[3, 3, 4]: they are [S, 1 or B, R/2]"),
            ((S, 4), "[3, 4]: they are [S, 1 or B, R/2]"),
            ((S, 1, 5), "R is 10, of heads of D 8; R/2 is from 1 to D/2, 4"),
            ((S, 1, 0), "R is 0, of heads of D 8; R/2 is from 1 to D/2, 4"),
        )
    ),
    (dict(layout="neox"), "'neox' is not a layout: choose half (GPT-NeoX, LLaMA) or interleaved"),
]
TOKENS = [
    (dict(targets=targets(S * B)), "targets [6] beside leading"),
    (dict(targets=targets(S, B, 1)), "targets [3, 2, 1] beside leading"),
    (dict(targets=targets(S, B).int()), "targets are torch.int32: they are torch.int64; give"),
]
LOSSES = [
    (dict(label_smoothing=1.0), "label_smoothing=1.0: it is from 0 to below 1"),
    (dict(label_smoothing=-0.1), "label_smoothing=-0.1: it is from 0 to below 1"),
    (dict(label_smoothing=torch.zeros(())), "label_smoothing is a tensor"),
    (dict(z_loss=-1.0), "z_loss=-1.0: it is finite and at least 0"),
]
CLASSES = [
    (dict(vocab_size=0), "vocab_size=0: it is from 1 to the 10 columns; None takes all"),
    (dict(vocab_size=11), "vocab_size=11: it is from 1 to the 10 columns"),
    (dict(token_weight=normal()), "token_weight [] beside leading"),
    (dict(token_weight=normal(1)), "token_weight [1] beside leading"),
    (dict(token_weight=targets(S, B)), "token_weight is torch.int64"),
]
LOGITS = [
    (dict(logits=INTEGERS), "logits is torch.int64"),
    (dict(logits=normal(S, B, 0)), "logits [3, 2, 0]: they are [..., V]; V is at least 1"),
]
PARTS = [
    (dict(logits=normal(S, B, V)), "logits [3, 2, 10]: they are [T, W]"),
    (dict(logits=torch.ones(S, V).long()), "logits is torch.int64"),
    (dict(targets=targets(1)), "targets [1] beside leading logits [3]: equal shapes; give [3]"),
    (dict(targets=targets(S).int()), "give targets.long()"),
    (dict(first_column=-1), "first_column=-1: it is at least 0"),
    (dict(columns=11), "columns=11: it is from 0 to the 10 columns"),
    (dict(columns=-1), "columns=-1: it is from 0"),
]
FLAT = torch.zeros(2 * H)


def apart(master: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where `adamw_` writes: to this, and to moments of their own."""
    return master, torch.zeros(H), torch.zeros(H)


WRONG: dict[str, list[tuple[dict[str, Any], str]]] = {
    "rms_norm": NORMS,
    "add_rms_norm": [
        *NORMS,
        (dict(residual=normal(H)), "residual [6] beside x [3, 6]: equal shapes; give [3, 6]"),
        (dict(residual=torch.ones(S, H).int()), "residual is torch.int32"),
    ],
    "rope": [
        *TURNS,
        (dict(q=normal(S, B, N * D)), "q [3, 2, 32]: it is [S, B, N, D]"),
        (dict(q=normal(S, B, 0, D)), "q [3, 2, 0, 8]: it is [S, B, N, D]; N is at least 1"),
        (dict(q=torch.ones(S, B, N, D).int()), "q is torch.int32"),
        (dict(k=normal(S, B, K, D).half()), "k is torch.float16: q is torch.float32"),
        *(
            (dict(k=normal(*shape)), "differ in heads only; give [3, 2, K, 8]")
            for shape in ((2, B, K, D), (S, 1, K, D), (S, B, K, 6), (S, B, D), (S, B, 0, D))
        ),
    ],
    "rope_packed": [
        *TURNS,
        (dict(qkv=normal(S, B, 60)), "qkv [3, 2, 60]: it is [S, B, (N + 2 K) D] with N 4 and K 2"),
        (dict(qkv=normal(S, 64)), "the last is a multiple of 8"),
        (dict(num_heads=0), "num_heads=0, num_kv_heads=2: both are at least 1"),
        (dict(num_kv_heads=0), "num_heads=4, num_kv_heads=0"),
    ],
    "softmax": [
        (dict(x=torch.ones(S, S).int()), "x is torch.int32: it is floating"),
        (dict(x=normal(4)), "x [4]: it has 2 dimensions at least; [..., Sq, Sk]"),
        (dict(x=normal(), causal=False), "x []: it has 1 dimensions at least; [..., Sk]"),
        (dict(scale=0.0), "scale=0.0: it is finite and above 0"),
        (dict(scale=float("nan")), "scale=nan: it is finite"),
        (dict(scale=float("inf")), "scale=inf: it is finite"),
        (dict(scale=torch.ones(())), "scale is a tensor: it is a number"),
        (dict(mask=torch.ones(S, S).int()), "mask is torch.int32: it is bool or floating"),
        (dict(mask=normal(3, 1, S, S)), "mask [3, 1, 3, 3] beside x [2, 4, 3, 3]: it does not"),
        (dict(mask=normal(1, B, N, S, S)), "it does not broadcast to x"),
        (dict(mask=normal(S, S).requires_grad_()), "it has none; give mask.detach()"),
    ],
    "swiglu": [
        (dict(gate_up=normal(S, 7)), "gate_up [3, 7]: it is [..., 2 F]; the last is even"),
        (dict(gate_up=normal(S, 0)), "gate_up [3, 0]"),
        (dict(gate_up=normal()), "gate_up []"),
        (dict(gate_up=torch.ones(S, 8).int()), "gate_up is torch.int32"),
    ],
    "cross_entropy": [*TOKENS, *LOSSES, *LOGITS],
    "cross_entropy_with_grad": [*TOKENS, *LOSSES, *CLASSES, *LOGITS],
    "linear_cross_entropy": [
        *TOKENS,
        *LOSSES,
        *CLASSES,
        (dict(hidden=normal(S, B, 0)), "hidden [3, 2, 0]: it is [..., H]; H is at least 1"),
        (dict(hidden=torch.ones(S, B, H).int()), "hidden is torch.int32"),
        (dict(weight=normal(V, 5)), "weight [10, 5] beside hidden [3, 2, 6]: it is [V, H]"),
        (dict(weight=normal(0, H)), "give [V, 6], V at least 1"),
        (dict(weight=normal(V, H).half()), "weight is torch.float16: hidden is torch.float32"),
        (dict(main_grad=torch.zeros(H, V)), "main_grad [6, 10] beside weight [10, 6]"),
        (dict(main_grad=torch.zeros(V, H).half()), "main_grad is torch.float16: sums of products"),
        (dict(chunk_rows=0), "chunk_rows=0: it is at least 1; None takes the default"),
    ],
    "vocab_parallel_statistics": PARTS,
    "vocab_parallel_gradient_": [
        *PARTS,
        *LOSSES,
        (dict(logits=normal(V, S).t()), "logits of strides [1, 3]: rows that are overwritten"),
        (dict(logits=normal(V).expand(S, V)), "logits of strides [0, 1]"),
        (dict(log_sum=normal(S).half()), "log_sum is torch.float16: it is not rounded"),
        (dict(log_sum=normal()), "log_sum [] beside leading logits [3]"),
        (dict(gradient=normal(1)), "gradient [1] beside leading logits [3]"),
        (dict(gradient=targets(S)), "gradient is torch.int64"),
        (dict(vocab_size=9), "vocab_size=9: it counts the 10 columns from 0 on"),
        (dict(columns=0, vocab_size=0), "vocab_size=0"),
    ],
    "adamw_": [
        (dict(master=normal(H).half()), "master is torch.float16: small steps are lost"),
        (dict(master=normal(2 * H)[::2]), "master of strides [2]: buffers are contiguous"),
        *(
            case
            for name in ("exp_avg", "exp_avg_sq")
            for case in (
                ({name: torch.zeros(H).half()}, f"{name} is torch.float16: moments are alike"),
                ({name: torch.zeros(H + 1)}, f"{name} [7] beside master [6]"),
                ({name: torch.zeros(2 * H)[::2]}, f"{name} of strides [2]"),
            )
        ),
        (dict(gradient=normal(1)), "gradient [1] beside master [6]: equal shapes; give [6]"),
        (dict(gradient=torch.ones(H).int()), "gradient is torch.int32"),
        (dict(gradient=normal(1).expand(H)), "gradient of strides [0]"),
        (dict(copy=normal(H - 1)), "copy [5] beside master [6]"),
        (dict(copy=torch.zeros(H).int()), "copy is torch.int32"),
        (dict(copy=torch.zeros(2 * H)[::2]), "copy of strides [2]"),
        *(
            ({name: torch.ones(size)}, f"{name} [{size}]: it has one element; [] or [1]")
            for name, size in (("step", 0), ("scale", 2), ("skip", 2), ("run", 2))
        ),
        (dict(out=apart(FLAT[:H])[:2]), "out of 2: give new master, exp_avg and exp_avg_sq"),
        (
            dict(out=apart(FLAT[:H].double())),
            "out master is torch.float64: it has master's; give torch.float32",
        ),
        (dict(out=apart(FLAT[: H + 1])), "out master [7] beside master [6]"),
        (dict(out=apart(FLAT[::2][:H])), "out master of strides [2]"),
        (dict(out=apart(FLAT[:H]), master=FLAT[1 : H + 1]), "out master overlaps master: what is"),
        (dict(out=apart(FLAT[:H]), gradient=FLAT[:H]), "out master overlaps gradient"),
        (dict(out=apart(FLAT[:H]), copy=FLAT[H - 1 : 2 * H - 1]), "out master overlaps copy"),
        (dict(out=(*apart(FLAT[:H])[:2], FLAT[1 : H + 1])), "out exp_avg_sq overlaps out master"),
        *(({name: 1.0}, f"{name}=1.0: it is from 0 to below 1") for name in ("beta1", "beta2")),
        (dict(lr=-1.0), "lr=-1.0: it is finite and at least 0"),
        (dict(lr=torch.ones(())), "lr is a tensor: it is a number"),
        (dict(eps=float("nan")), "eps=nan: it is finite"),
        (dict(weight_decay=float("inf")), "weight_decay=inf: it is finite"),
    ],
}
CASES = [(operation, *case) for operation, cases in WRONG.items() for case in cases]


@pytest.mark.parametrize(("operation", "wrong", "message"), CASES, ids=lambda x: str(x)[:60])
def test_both_refuse_in_the_same_words(operation: str, wrong: dict, message: str) -> None:
    said = []
    for name in BACK_ENDS:
        with use_backend(name), pytest.raises(ValueError) as refusal:
            call(operation, **wrong)
        said.append(str(refusal.value))
    assert said[0] == said[1]
    assert said[0].startswith(f"{operation}: ") and message in said[0]


@pytest.mark.parametrize("operation", RIGHT)
def test_what_is_right_is_taken(operation: str) -> None:
    for name in BACK_ENDS:
        with use_backend(name):
            call(operation)


def test_every_operation_has_its_check() -> None:
    others = {"OPERATIONS", "BackendError", "back_ends", "use_backend"}
    assert set(RIGHT) == set(WRONG) == set(megalite_kernels.__all__) - others


def test_checks_look_at_no_element() -> None:
    """Tensors without data are taken and refused as others are."""
    q, k, cos = (torch.empty(S, B, n, D, device="meta") for n in (N, K, K))
    check.check_rope(q, k, *(cos[:, :1, 0, :4],) * 2, "half")
    with pytest.raises(ValueError, match="give float32"):
        check.check_rope(q, k, *(cos[:, :1, 0, :4].half(),) * 2, "half")


def test_checks_leave_no_break_in_a_graph() -> None:
    table, flat, tokens = torch.ones(S, 1, 4), torch.ones(H), torch.ones(S, B)
    mask = torch.ones(B, 1, 1, dtype=torch.bool)

    def run(x: Tensor, qkv: Tensor, hits: Tensor) -> Tensor:
        check.check_add_rms_norm(x, x, flat, 1e-5, "llama")
        check.check_rope_packed(qkv, table, table, N, K, "half", False)
        q = qkv.unflatten(-1, (-1, D))
        check.check_rope(q, q, table, table, "half")
        check.check_softmax(q, 0.5, mask, True)
        check.check_swiglu(x)
        weight = qkv[0, 0].unflatten(0, (-1, 1)).expand(-1, H)
        options = (V, 0.1, 0.1)
        check.check_cross_entropy("cross_entropy", qkv, hits, tokens, *options)
        check.check_linear_cross_entropy(x, weight, hits, tokens, weight, 4, *options)
        rows = (qkv.flatten(0, 1), hits.flatten())
        check.check_vocab_parallel_statistics(*rows, 0, V)
        sums = tokens.flatten()
        check.check_vocab_parallel_gradient(*rows, sums, sums, 0, V, V, 0.1, 0.1)
        buffers = (flat, flat, flat, flat, flat[:1])
        check.check_adamw(*buffers, 1.0, 0.9, 0.9, 1e-8, 0.1, None, flat[:1], flat)
        return x + 1

    for dynamic in (False, True):
        torch.compiler.reset()
        compiled = torch.compile(run, backend="eager", fullgraph=True, dynamic=dynamic)
        compiled(normal(S, B, H), normal(S, B, (N + 2 * K) * D), targets(S, B))
