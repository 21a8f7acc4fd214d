"""What each operation takes, checked once on the dispatch page, before either back end.

A kernel believes its arguments: it reads and writes beyond a tensor that is smaller than another
argument says. So both back ends refuse the same arguments with the same ValueError: the operation,
the argument, what it is, the rule, the nearest right choice.

Shapes, dtypes and strides are all that is looked at, never an element: a check takes a few
microseconds, waits for no GPU, and leaves no break in a compiled graph.
"""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor

FLOATING = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
PRECISE = (torch.float32, torch.float64)
CASTINGS = ("fp32", "llama", "gemma")
LAYOUTS = ("half", "interleaved")


def check_rms_norm(operation: str, x: Tensor, weight: Tensor, eps: float, casting: str) -> None:
    """Of `rms_norm`, and of `add_rms_norm` all but the residual."""
    _floating(operation, "x", x)
    _floating(operation, "weight", weight)
    if x.dim() < 1 or x.shape[-1] == 0:
        _refuse(operation, f"x {_sizes(x)}", "it is [..., H]", "H is at least 1")
    if weight.shape != x.shape[-1:]:
        beside = f"weight {_sizes(weight)} beside x {_sizes(x)}"
        _refuse(operation, beside, "it has x's last dimension", f"give [{x.shape[-1]}]")
    _at_least_0(operation, "eps", eps)
    if casting not in CASTINGS:
        _refuse(operation, f"{casting!r} is not a casting", "choose fp32, llama or gemma")


def check_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, casting: str
) -> None:
    """Of `add_rms_norm`."""
    check_rms_norm("add_rms_norm", x, weight, eps, casting)
    _floating("add_rms_norm", "residual", residual)
    _shape("add_rms_norm", "residual", residual, "x", x.shape)


def check_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, layout: str) -> None:
    """Of `rope`."""
    _floating("rope", "q", q)
    if q.dim() != 4 or q.shape[2] == 0:
        _refuse("rope", f"q {_sizes(q)}", "it is [S, B, N, D]", "N is at least 1")
    length, batch, _, dim = q.shape
    if k.dim() != 4 or k.shape[2] == 0 or k.shape != (length, batch, k.shape[2], dim):
        beside = f"k {_sizes(k)} beside q {_sizes(q)}"
        _refuse("rope", beside, "they differ in heads only", f"give [{length}, {batch}, K, {dim}]")
    if k.dtype != q.dtype:
        _refuse("rope", f"k is {k.dtype}", f"q is {q.dtype}", "give both of one dtype")
    _check_tables("rope", length, batch, dim, cos, sin, layout)


def check_rope_packed(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    layout: str,
    inplace: bool,
) -> None:
    """Of `rope_packed`.

    Raises:
        RuntimeError: what torch's operations in place don't take: a leaf that requires a gradient.
    """
    _floating("rope_packed", "qkv", qkv)
    if num_heads < 1 or num_kv_heads < 1:
        heads = f"num_heads={num_heads}, num_kv_heads={num_kv_heads}"
        _refuse("rope_packed", heads, "both are at least 1")
    count = num_heads + 2 * num_kv_heads
    if qkv.dim() != 3 or qkv.shape[2] % count:
        parts = f"[S, B, (N + 2 K) D] with N {num_heads} and K {num_kv_heads}"
        right = f"the last is a multiple of {count}"
        _refuse("rope_packed", f"qkv {_sizes(qkv)}", f"it is {parts}", right)
    length, batch, width = qkv.shape
    _check_tables("rope_packed", length, batch, width // count, cos, sin, layout)
    if inplace and not torch.compiler.is_compiling() and torch.is_grad_enabled():
        base = qkv if qkv._base is None else qkv._base
        if base.is_leaf and base.requires_grad:
            whose = "a leaf" if base is qkv else "a view of a leaf"
            raise RuntimeError(
                f"rope_packed: {whose} Variable that requires grad is being used in an in-place "
                "operation; give inplace=False"
            )


def _check_tables(
    operation: str, length: int, batch: int, dim: int, cos: Tensor, sin: Tensor, layout: str
) -> None:
    shape = cos.shape
    if sin.shape != shape or sin.dtype != cos.dtype:
        given = f"cos {cos.dtype} {_sizes(cos)} and sin {sin.dtype} {_sizes(sin)}"
        _refuse(operation, given, "they are alike")
    if cos.dtype not in PRECISE:
        _refuse(operation, f"cos and sin are {cos.dtype}", "they are not rounded", "give float32")
    if len(shape) != 3 or shape[0] != length or (shape[1] != 1 and shape[1] != batch):
        right = f"give [{length}, {'1' if batch == 1 else f'1 or {batch}'}, R/2]"
        _refuse(operation, f"cos and sin {_sizes(cos)}", "they are [S, 1 or B, R/2]", right)
    if not 2 <= 2 * shape[2] <= dim:
        found = f"cos and sin {_sizes(cos)}"
        rule = f"R is {2 * shape[2]}, of heads of D {dim}"
        _refuse(operation, found, rule, f"R/2 is from 1 to D/2, {dim // 2}")
    if layout not in LAYOUTS:
        choices = "choose half (GPT-NeoX, LLaMA) or interleaved (GPT-J)"
        _refuse(operation, f"{layout!r} is not a layout", choices)


def check_softmax(x: Tensor, scale: float, mask: Tensor | None, causal: bool) -> None:
    """Of `softmax`."""
    _floating("softmax", "x", x)
    _number("softmax", "scale", scale)
    if not 0 < scale < math.inf:
        _refuse("softmax", f"scale={scale}", "it is finite and above 0", "1.0 leaves x as it is")
    if x.dim() < 1 + causal:
        dims = "[..., Sq, Sk]" if causal else "[..., Sk]"
        _refuse("softmax", f"x {_sizes(x)}", f"it has {1 + causal} dimensions at least", dims)
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        _refuse("softmax", f"mask is {mask.dtype}", "it is bool or floating", "give mask.bool()")
    if mask.requires_grad:
        _refuse("softmax", "mask requires a gradient", "it has none", "give mask.detach()")
    sizes = zip(reversed(mask.shape), reversed(x.shape), strict=False)
    if mask.dim() > x.dim() or any(m != 1 and m != n for m, n in sizes):
        beside = f"mask {_sizes(mask)} beside x {_sizes(x)}"
        _refuse("softmax", beside, "it does not broadcast to x", "sizes are x's or 1")


def check_swiglu(gate_up: Tensor) -> None:
    """Of `swiglu`."""
    _floating("swiglu", "gate_up", gate_up)
    if gate_up.dim() < 1 or gate_up.shape[-1] == 0 or gate_up.shape[-1] % 2:
        found = f"gate_up {_sizes(gate_up)}"
        _refuse("swiglu", found, "it is [..., 2 F]", "the last is even and at least 2")


def check_cross_entropy(
    operation: str,
    logits: Tensor,
    targets: Tensor,
    token_weight: Tensor | None,
    vocab_size: int | None,
    label_smoothing: float,
    z_loss: float,
) -> None:
    """Of `cross_entropy` and `cross_entropy_with_grad`."""
    _floating(operation, "logits", logits)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        _refuse(operation, f"logits {_sizes(logits)}", "they are [..., V]", "V is at least 1")
    _check_tokens(operation, "leading logits", logits, targets, token_weight)
    _check_loss(operation, logits.shape[-1], vocab_size, label_smoothing, z_loss)


def check_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weight: Tensor,
    main_grad: Tensor | None,
    chunk_rows: int | None,
    vocab_size: int | None,
    label_smoothing: float,
    z_loss: float,
) -> None:
    """Of `linear_cross_entropy`."""
    name = "linear_cross_entropy"
    _floating(name, "hidden", hidden)
    if hidden.dim() < 1 or hidden.shape[-1] == 0:
        _refuse(name, f"hidden {_sizes(hidden)}", "it is [..., H]", "H is at least 1")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        beside = f"weight {_sizes(weight)} beside hidden {_sizes(hidden)}"
        right = f"give [V, {hidden.shape[-1]}], V at least 1"
        _refuse(name, beside, "it is [V, H]", right)
    if weight.dtype != hidden.dtype:
        found = f"weight is {weight.dtype}"
        _refuse(name, found, f"hidden is {hidden.dtype}", "give both of one dtype")
    _check_tokens(name, "leading hidden", hidden, targets, token_weight)
    _check_loss(name, weight.shape[0], vocab_size, label_smoothing, z_loss)
    if main_grad is not None:
        _shape(name, "main_grad", main_grad, "weight", weight.shape)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if main_grad.dtype != dtype:
            found, rule = f"main_grad is {main_grad.dtype}", "sums of products are not rounded"
            _refuse(name, found, rule, f"give {dtype}")
    if chunk_rows is not None and chunk_rows < 1:
        _refuse(name, f"chunk_rows={chunk_rows}", "it is at least 1", "None takes the default")


def _check_tokens(
    operation: str, of: str, x: Tensor, targets: Tensor, token_weight: Tensor | None
) -> None:
    """Targets and weights: one for each vector of `x`."""
    leading = x.shape[:-1]
    _int64(operation, targets)
    _shape(operation, "targets", targets, of, leading)
    if token_weight is not None:
        _floating(operation, "token_weight", token_weight)
        _shape(operation, "token_weight", token_weight, of, leading)


def _check_loss(
    operation: str, width: int, vocab_size: int | None, label_smoothing: float, z_loss: float
) -> None:
    if vocab_size is not None and not 1 <= vocab_size <= width:
        rule = f"it is from 1 to the {width} columns"
        _refuse(operation, f"vocab_size={vocab_size}", rule, "None takes all")
    _number(operation, "label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 1:
        _refuse(operation, f"label_smoothing={label_smoothing}", "it is from 0 to below 1")
    _at_least_0(operation, "z_loss", z_loss)


def check_vocab_parallel_statistics(
    logits: Tensor,
    targets: Tensor,
    first_column: int,
    columns: int,
    operation: str = "vocab_parallel_statistics",
) -> None:
    """Of `vocab_parallel_statistics`, and of `vocab_parallel_gradient_` what it has in common."""
    _floating(operation, "logits", logits)
    if logits.dim() != 2:
        _refuse(operation, f"logits {_sizes(logits)}", "they are [T, W]", "flatten(0, -2) of them")
    _int64(operation, targets)
    _shape(operation, "targets", targets, "leading logits", logits.shape[:1])
    if first_column < 0:
        _refuse(operation, f"first_column={first_column}", "it is at least 0", "rank * W")
    if not 0 <= columns <= logits.shape[1]:
        rule = f"it is from 0 to the {logits.shape[1]} columns"
        _refuse(operation, f"columns={columns}", rule, "the rest is padding")


def check_vocab_parallel_gradient(
    logits: Tensor,
    targets: Tensor,
    log_sum: Tensor,
    gradient: Tensor,
    first_column: int,
    columns: int,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
) -> None:
    """Of `vocab_parallel_gradient_`."""
    name = "vocab_parallel_gradient_"
    check_vocab_parallel_statistics(logits, targets, first_column, columns, name)
    rows, width = logits.shape
    if (width > 1 and logits.stride(1) != 1) or (rows > 1 and logits.stride(0) < width):
        found = f"logits of strides {[*logits.stride()]}"
        _refuse(
            name, found, "rows that are overwritten are dense and apart", "contiguous() of them"
        )
    if log_sum.dtype not in PRECISE:
        _refuse(name, f"log_sum is {log_sum.dtype}", "it is not rounded", "give float64 or float32")
    _shape(name, "log_sum", log_sum, "leading logits", logits.shape[:1])
    _floating(name, "gradient", gradient)
    _shape(name, "gradient", gradient, "leading logits", logits.shape[:1])
    if vocab_size < max(1, first_column + columns if columns else 1):
        rule = f"it counts the {columns} columns from {first_column} on"
        _refuse(name, f"vocab_size={vocab_size}", rule, "V over all ranks, at least 1")
    _check_loss(name, width, None, label_smoothing, z_loss)


def check_adamw(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: Tensor | None,
    skip: Tensor | None,
    copy: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
    run: Tensor | None = None,
    draws: tuple[int, int] | None = None,
) -> None:
    """Of `adamw_`."""
    rounded = () if draws is None else (torch.bfloat16,)
    if master.dtype not in (*PRECISE, *rounded):
        rule = "small steps are lost when rounded"
        advice = "give float32, and the rest as copy, or bfloat16 with draws"
        _refuse("adamw_", f"master is {master.dtype}", rule, advice)
    wide = torch.promote_types(master.dtype, torch.float32)
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        narrow = rounded if wide == torch.float32 else ()
        if moment.dtype not in (wide, *narrow) or moment.dtype != exp_avg.dtype:
            rule = "moments are alike, as precise as master or bfloat16 with draws"
            _refuse("adamw_", f"{name} is {moment.dtype}", rule, f"give {wide}")
        _buffer(name, moment, master)
    if rounded and torch.bfloat16 not in (master.dtype, exp_avg.dtype):
        _refuse("adamw_", f"draws={draws}", "nothing is bfloat16, to be rounded by them", "None")
    _buffer("master", master, master)
    _floating("adamw_", "gradient", gradient)
    _buffer("gradient", gradient, master)
    if copy is not None:
        _floating("adamw_", "copy", copy)
        _buffer("copy", copy, master)
    if out is not None:
        read = {"gradient": gradient, "master": master, "exp_avg": exp_avg}
        _check_out(out, {**read, "exp_avg_sq": exp_avg_sq}, copy)
    for name, flag in (("step", step), ("scale", scale), ("skip", skip), ("run", run)):
        if flag is not None and flag.numel() != 1:
            _refuse("adamw_", f"{name} {_sizes(flag)}", "it has one element", "[] or [1]")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        _number("adamw_", name, beta)
        if not 0 <= beta < 1:
            _refuse("adamw_", f"{name}={beta}", "it is from 0 to below 1")
    _at_least_0("adamw_", "lr", lr)
    _at_least_0("adamw_", "eps", eps)
    _at_least_0("adamw_", "weight_decay", weight_decay)


def _check_out(
    out: tuple[Tensor, Tensor, Tensor], read: dict[str, Tensor], copy: Tensor | None
) -> None:
    """What `adamw_` writes apart from what it reads."""
    if len(out) != 3:
        _refuse("adamw_", f"out of {len(out)}", "give new master, exp_avg and exp_avg_sq")
    master = read["master"]
    written = {"copy": copy} if copy is not None else {}
    for name, buffer in zip(("out master", "out exp_avg", "out exp_avg_sq"), out, strict=True):
        dtype = read[name.removeprefix("out ")].dtype
        if buffer.dtype != dtype:
            _refuse("adamw_", f"{name} is {buffer.dtype}", f"it has {name[4:]}'s", f"give {dtype}")
        _buffer(name, buffer, master)
        for other, x in (*read.items(), *written.items()):
            if _overlap(buffer, x):
                rule = "what is written to out stays apart"
                _refuse("adamw_", f"{name} overlaps {other}", rule, "leave out to work in place")
        written[name] = buffer


def _overlap(x: Tensor, y: Tensor) -> bool:
    """Whether two contiguous tensors share memory; a compiler that traces can't say."""
    if torch.compiler.is_compiling() or x.device != y.device or not (x.numel() and y.numel()):
        return False
    starts, ends = zip(*((t.data_ptr(), t.data_ptr() + t.nbytes) for t in (x, y)), strict=True)
    return max(starts) < min(ends)


def _buffer(name: str, x: Tensor, master: Tensor) -> None:
    if x is not master:
        _shape("adamw_", name, x, "master", master.shape)
    if not x.is_contiguous():
        found = f"{name} of strides {[*x.stride()]}"
        _refuse("adamw_", found, "buffers are contiguous", "give a buffer, or a slice of one")


def _floating(operation: str, name: str, x: Tensor) -> None:
    if x.dtype not in FLOATING:
        choices = "float32, bfloat16, float16 or float64"
        _refuse(operation, f"{name} is {x.dtype}", "it is floating", f"give {choices}")


def _int64(operation: str, targets: Tensor) -> None:
    if targets.dtype != torch.int64:
        found = f"targets are {targets.dtype}"
        _refuse(operation, found, "they are torch.int64", "give targets.long()")


def _shape(operation: str, name: str, x: Tensor, of: str, shape: torch.Size) -> None:
    if x.shape != shape:
        found = f"{name} {_sizes(x)} beside {of} {[*shape]}"
        _refuse(operation, found, "equal shapes", f"give {[*shape]}")


def _number(operation: str, name: str, value: float) -> None:
    if isinstance(value, Tensor):
        found = f"{name} is a tensor"
        _refuse(operation, found, "it is a number, which the launch takes", f"give {name}.item()")


def _at_least_0(operation: str, name: str, value: float) -> None:
    _number(operation, name, value)
    if not 0 <= value < math.inf:
        _refuse(operation, f"{name}={value}", "it is finite and at least 0")


def _sizes(x: Tensor) -> list[int]:
    return [*x.shape]


def _refuse(operation: str, found: str, *rules: str) -> NoReturn:
    raise ValueError(f"{operation}: {found}: {'; '.join(rules)}")
