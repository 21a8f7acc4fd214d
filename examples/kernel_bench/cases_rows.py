"""Cases of norms, rotary embedding, softmax and SwiGLU.

Legend: S sequence, B batch, N query heads, K key/value heads, D head dim, F ffn.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kernel_bench.op import Floor, Op, normal, row_chunks
from kernel_bench.problem import BACKWARD, BOTH, FORWARD, Expected, Problem

EPS = 1e-5
HIDDEN = ("2048", "4096", "8192", "16384")
NORM_SWEEP = tuple(
    f"{rows}x{hidden}" for rows in (2048, 8192, 32768) for hidden in (1024, *map(int, HIDDEN))
)
EVERYWHERE = slice(None)


def make_norm(
    size: tuple[int, ...], direction: str, device: torch.device, dtype: torch.dtype, *, add: bool
) -> Problem:
    """x, weight and, to add, a residual; gradients of the outputs."""
    like = (device, dtype)
    tensors = {"x": normal(size, like)}
    if add:
        tensors["residual"] = normal(size, like)
    tensors["weight"] = normal(size[1:], like, 0.1) + 1
    gradients = tuple(normal(size, like) for _ in range(1 + add))
    name = "add_rms_norm" if add else "rms_norm"
    return Problem(name, direction, size, tensors, tuple(tensors), gradients, {"eps": EPS})


def norm_floor(size: tuple[int, ...], direction: str, *, add: bool) -> Floor:
    """2 or 4 bytes read and written an element forward, and 4 or 6 read, 2 written backward."""
    elements, vector = size[0] * size[1], 2 * size[1]
    each = 4 if add else 2
    forward = Floor(each * elements + vector, each * elements)
    if direction == FORWARD:
        return forward
    read = (each + 2) * elements + vector
    backward = Floor(read, 2 * elements + vector)
    return Floor(forward.read + backward.read, forward.written + backward.written)


def norm_reference(problem: Problem, *, add: bool) -> Iterator[Expected]:
    """Outputs y and, to add, the new residual; gradients by x, the residual and the weight."""
    tensors = problem.tensors
    weight = tensors["weight"].double()
    weight_gradient = torch.zeros_like(weight)
    inputs = 1 + add  # as many as there are outputs
    for rows in row_chunks(*problem.size):
        x = tensors["x"][rows].double()
        if add:
            x = (x + tensors["residual"][rows].double()).to(tensors["x"].dtype).double()
            yield 1, rows, x
        scale = (x.square().mean(-1, keepdim=True) + problem.options["eps"]).rsqrt()
        normed = x * scale
        yield 0, rows, normed * weight
        dy = problem.gradients[0][rows].double()
        weight_gradient += (dy * normed).sum(0)
        dy = dy * weight
        dx = scale * (dy - normed * (dy * normed).mean(-1, keepdim=True))
        if add:
            dx += problem.gradients[1][rows].double()
        for i in range(inputs):
            yield inputs + i, rows, dx
    yield 2 * inputs, EVERYWHERE, weight_gradient


def make_rope(
    size: tuple[int, ...], direction: str, device: torch.device, dtype: torch.dtype, *, name: str
) -> Problem:
    """Queries, keys (and values, packed) with the tables of their angles in fp32."""
    batch, length, heads, kv_heads, width = size
    like = (device, dtype)
    frequencies = 10000.0 ** -(torch.arange(0, width, 2, device=device).double() / width)
    angles = torch.outer(torch.arange(length, device=device).double(), frequencies)[:, None]
    tensors = {"cos": angles.cos().float(), "sin": angles.sin().float()}
    packed = name.startswith("rope_packed")
    every = (heads, kv_heads, kv_heads) if packed else (heads, kv_heads)
    if packed:
        tensors["qkv"] = normal((length, batch, sum(every) * width), like)
    else:
        tensors["q"], tensors["k"] = (normal((length, batch, n, width), like) for n in every)
    gradients = tuple(normal((length, batch, n, width), like) for n in every)
    layout = "interleaved" if name.endswith("interleaved") else "half"
    options = {"layout": layout, "heads": heads, "kv_heads": kv_heads, "width": width}
    leaves = ("qkv",) if packed else ("q", "k")
    return Problem(name, direction, size, tensors, leaves, gradients, options)


def rope_floor(size: tuple[int, ...], direction: str, *, packed: bool) -> Floor:
    """2 bytes read and written a turned element; backward, of values too if they are packed."""
    batch, length, heads, kv_heads, width = size
    tokens, tables = batch * length, 4 * length * width
    turned = 2 * tokens * (heads + kv_heads) * width
    if direction == FORWARD:
        return Floor(turned + tables, turned)
    back = 2 * tokens * (heads + (1 + packed) * kv_heads) * width
    return Floor(turned + back + 2 * tables, turned + back)


def turned(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """The pairs of x [S, B, N, D] turned; tables [S, 1, D/2]."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    if layout == "half":
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def split_heads(qkv: Tensor, problem: Problem) -> tuple[Tensor, ...]:
    """Views [S, B, heads, D] of queries, keys and values."""
    heads, kv_heads = problem.options["heads"], problem.options["kv_heads"]
    by_head = qkv.unflatten(-1, (heads + 2 * kv_heads, problem.options["width"]))
    return by_head.split((heads, kv_heads, kv_heads), dim=2)


def rope_reference(problem: Problem) -> Iterator[Expected]:
    """Turned tensors; gradients turned back."""
    tensors, layout = problem.tensors, problem.options["layout"]
    cos, sin = tensors["cos"].double(), tensors["sin"].double()
    packed = "qkv" in tensors
    inputs = split_heads(tensors["qkv"], problem) if packed else (tensors["q"], tensors["k"])
    for index, x in enumerate(inputs):
        values = packed and index == 2
        yield index, EVERYWHERE, x if values else turned(x.double(), cos, sin, layout)
    back = []
    for index, dy in enumerate(problem.gradients):
        values = packed and index == 2
        back.append(dy.double() if values else turned(dy.double(), cos, -sin, layout))
    if packed:
        yield len(inputs), EVERYWHERE, torch.cat(back, dim=2).flatten(2)
        return
    for index, dx in enumerate(back):
        yield len(inputs) + index, EVERYWHERE, dx


def make_softmax(
    size: tuple[int, ...], direction: str, device: torch.device, dtype: torch.dtype, *, kind: str
) -> Problem:
    """Scores [1, heads, sq, sk]; a mask that is True where a score is hidden.

    The scale of `scaled` is 1: Liger and QuACK have none, and can take part so.
    """
    shape = (1, *size)
    tensors = {"x": normal(shape, (device, dtype), 4.0)}
    if kind == "masked":
        tensors["mask"] = torch.rand((1, 1, *size[1:]), device=device) < 0.1
    scale = 1.0 if kind == "scaled" else 0.125
    gradients = (normal(shape, (device, dtype)),)
    options = {"scale": scale, "causal": kind == "causal"}
    return Problem(f"softmax_{kind}", direction, size, tensors, ("x",), gradients, options)


def softmax_floor(size: tuple[int, ...], direction: str, *, kind: str) -> Floor:
    """2 read and written forward (and the mask once), 4 read and 2 written backward.

    Causal: half of what is read, since what a mask hides needn't be; the zeros must be written.
    """
    heads, queries, keys = size
    elements = read = heads * queries * keys
    if kind == "causal":
        read = heads * queries * (queries + 1) // 2
    mask = queries * keys if kind == "masked" else 0
    forward, backward = Floor(2 * read + mask, 2 * elements), Floor(4 * read, 2 * elements)
    if direction == BOTH:
        return Floor(forward.read + backward.read, forward.written + backward.written)
    return backward if direction == BACKWARD else forward


def softmax_reference(problem: Problem) -> Iterator[Expected]:
    """Probabilities; dx = scale * y * (dy - sum y dy)."""
    keys, queries = problem.size[-1], problem.size[-2]
    x, dy = (t.view(-1, keys) for t in (problem.tensors["x"], problem.gradients[0]))
    mask = problem.tensors.get("mask")
    columns = torch.arange(keys, device=x.device)
    scale = problem.options["scale"]
    for first in range(0, problem.size[0] * queries, queries):
        for rows in row_chunks(queries, keys):
            here = slice(first + rows.start, first + rows.stop)
            scores = x[here].double() * scale
            if mask is not None:
                scores.masked_fill_(mask[0, 0, rows], -torch.inf)
            if problem.options["causal"]:
                of_row = torch.arange(rows.start, rows.stop, device=x.device)[:, None]
                scores.masked_fill_(columns > of_row, -torch.inf)
            y = scores.softmax(-1)
            g = dy[here].double()
            yield 0, here, y
            yield 1, here, scale * y * (g - (y * g).sum(-1, keepdim=True))


def make_swiglu(
    size: tuple[int, ...], direction: str, device: torch.device, dtype: torch.dtype
) -> Problem:
    """The packed projection [rows, 2 F], gate first."""
    rows, width = size
    tensors = {"gate_up": normal((rows, 2 * width), (device, dtype))}
    gradients = (normal(size, (device, dtype)),)
    return Problem("swiglu", direction, size, tensors, ("gate_up",), gradients)


def swiglu_floor(size: tuple[int, ...], direction: str) -> Floor:
    """4 read, 2 written forward; 6 read, 4 written backward: of an element of the ffn."""
    elements = size[0] * size[1]
    if direction == FORWARD:
        return Floor(4 * elements, 2 * elements)
    return Floor(10 * elements, 6 * elements)


def swiglu_reference(problem: Problem) -> Iterator[Expected]:
    """silu(gate) * up and its gradient."""
    for rows in row_chunks(*problem.size):
        gate, up = problem.tensors["gate_up"][rows].double().chunk(2, dim=-1)
        dy = problem.gradients[0][rows].double()
        sigmoid = gate.sigmoid()
        yield 0, rows, gate * sigmoid * up
        d_gate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
        yield 1, rows, torch.cat([d_gate, dy * gate * sigmoid], dim=-1)


def _norm(name: str, *, add: bool) -> Op:
    return Op(
        name=name,
        form="ROWSxHIDDEN",
        directions=(FORWARD, BOTH),
        table=tuple((f"8192x{hidden}", (FORWARD, BOTH)) for hidden in HIDDEN),
        sweep=NORM_SWEEP,
        small="64x256",
        make=partial(make_norm, add=add),
        floor=partial(norm_floor, add=add),
        reference=partial(norm_reference, add=add),
        outputs=1 + add,
    )


def _rope(name: str) -> Op:
    packed = "packed" in name
    return Op(
        name=name,
        form="BATCHxLENGTHxHEADSxKVHEADSxWIDTH",
        directions=(FORWARD, BOTH),
        table=(("4x4096x32x8x128", (BOTH,)),),
        sweep=("4x4096x32x8x128", "1x4096x32x8x128", "2x4096x32x8x64", "1x32768x32x8x128"),
        small="1x16x4x2x64",
        make=partial(make_rope, name=name),
        floor=partial(rope_floor, packed=packed),
        reference=rope_reference,
        outputs=3 if packed else 2,
    )


SQUARES = ("256x1024x1024", "64x2048x2048", "16x4096x4096", "4x8192x8192", "1x16384x16384")
LONGEST = {"scaled": "1x8192x32768", "masked": "1x8192x32768", "causal": "2x32768x32768"}


def _softmax(kind: str) -> Op:
    sizes = (*SQUARES, LONGEST[kind])
    directions = (FORWARD, BACKWARD) if kind == "scaled" else (BOTH,)
    return Op(
        name=f"softmax_{kind}",
        form="HEADSxQUERIESxKEYS",
        directions=(FORWARD, BACKWARD, BOTH),
        table=tuple((size, directions) for size in sizes),
        sweep=sizes,
        small="2x16x64" if kind != "causal" else "2x64x64",
        make=partial(make_softmax, kind=kind),
        floor=partial(softmax_floor, kind=kind),
        reference=softmax_reference,
        outputs=1,
    )


SWIGLU = Op(
    name="swiglu",
    form="ROWSxFFN",
    directions=(FORWARD, BOTH),
    table=(("8192x14336", (BOTH,)),),
    sweep=("8192x4096", "8192x8192", "8192x14336", "8192x28672", "2048x14336", "32768x14336"),
    small="64x128",
    make=make_swiglu,
    floor=swiglu_floor,
    reference=swiglu_reference,
    outputs=1,
)

OPS = (
    _norm("rms_norm", add=False),
    _norm("add_rms_norm", add=True),
    *map(_rope, ("rope_half", "rope_interleaved", "rope_packed_half", "rope_packed_interleaved")),
    *(_softmax(kind) for kind in ("scaled", "masked", "causal")),
    SWIGLU,
)
