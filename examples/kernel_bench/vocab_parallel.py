"""The vocab-parallel cross-entropy on GPUs that share the vocabulary, a process each.

Legend: S sequence, B batch, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from kernel_bench.measure import COPY, DTYPE, POISONED_BYTES, reason
from kernel_bench.op import Floor, row_chunks, size_text
from kernel_bench.problem import BOTH, Expected, Prepared, Problem, call, in_place, largest_error
from kernel_bench.rivals import found
from kernel_bench.table import ABSENT, WRONG, Line
from kernel_bench.timing import Clock, Times

NAME = "vocab_parallel_cross_entropy"
FORM = "TOKENSxVOCABULARY"
TABLE = ("8192x32000", "8192x128256")
GPUS = 2
BATCH = 2
TOLERANCE = 1e-2
CONTESTANTS = ("ours", "torch", "liger", "megatron")
SEED = 20261130

Tensors = Mapping[str, Tensor]


def floor(size: tuple[int, int], ranks: int) -> Floor:
    """4 bytes read (statistics, then gradient), 2 written, for each logit of a rank."""
    logits = size[0] * size[1] // ranks
    return Floor(4 * logits, 2 * logits)


def measure_all(
    sizes: Sequence[tuple[int, int]], names: Sequence[str], report: Callable[[list[Line]], None]
) -> None:
    """Start a process for each GPU and report every row as it is done.

    Raises:
        RuntimeError: fewer GPUs than GPUS, or a process failed.
    """
    here = torch.cuda.device_count()
    if here < GPUS:
        raise RuntimeError(f"{NAME} needs {GPUS} GPUs, and there is {here}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue: Any = mp.get_context("spawn").SimpleQueue()
    arguments = (port, list(sizes), list(names), queue)
    processes = mp.spawn(_rank_main, arguments, nprocs=GPUS, join=False)
    done = 0
    try:
        while not processes.join(timeout=0.2):
            done += _report_waiting(queue, report)
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        last = str(error).strip().splitlines()[-1]
        raise RuntimeError(f"{NAME}: a process failed: {last}") from None
    done += _report_waiting(queue, report)
    if done < len(sizes):
        raise RuntimeError(f"{NAME}: {done} of {len(sizes)} rows came back")


def _report_waiting(queue: Any, report: Callable[[list[Line]], None]) -> int:
    rows = 0
    while not queue.empty():
        report(queue.get())
        rows += 1
    return rows


def _rank_main(
    rank: int, port: int, sizes: list[tuple[int, int]], names: list[str], queue: Any
) -> None:
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group(
        *("nccl", f"tcp://127.0.0.1:{port}"), rank=rank, world_size=GPUS, device_id=device
    )
    clock = Clock(device)
    with torch.cuda.stream(clock.stream):
        for size in sizes:
            lines = _row(size, names, clock)
            if rank == 0:
                queue.put(lines)
    torch.cuda.synchronize()
    dist.destroy_process_group()


def _row(size: tuple[int, int], names: Sequence[str], clock: Clock) -> list[Line]:
    clock.new_row()
    total = floor(size, GPUS).total
    start = Line(NAME, size_text(size), BOTH, "", floor_bytes=total)
    problem, whole = make(size, clock.device, dist.get_rank(), GPUS)
    here, absent = found([name for name in names if name in CONTESTANTS])
    lines = {
        name: dataclasses.replace(start, contestant=name, status=ABSENT, note=why)
        for name, why in absent.items()
    }
    launches, kept = {}, []
    for rival in here:
        line = dataclasses.replace(start, contestant=rival.name)
        try:
            prepared, error = _checked(rival.name, problem, whole, clock)
            trouble = ""
        except Exception as problem_of_theirs:
            trouble = reason(problem_of_theirs)
        troubles: list[str] = [""] * GPUS
        dist.all_gather_object(troubles, trouble)
        if any(troubles):
            note = next(text for text in troubles if text)
            lines[rival.name] = dataclasses.replace(line, status=ABSENT, note=note)
            continue
        errors = [0.0] * GPUS
        dist.all_gather_object(errors, error)
        worst = worst_of(errors)
        line = dataclasses.replace(line, error=worst, note=prepared.note)
        if not worst <= TOLERANCE:
            lines[rival.name] = dataclasses.replace(line, status=WRONG)
            continue
        launch = clock.launch(prepared)
        memory = clock.peak_bytes(prepared)
        note = ", ".join(text for text in (prepared.note, launch.trouble) if text)
        lines[rival.name] = dataclasses.replace(line, memory_bytes=memory, note=note)
        launches[rival.name] = launch
        kept.append(prepared)
    del whole
    copy = clock.copy(total)
    launches[COPY] = clock.launch(copy)
    lines[COPY] = dataclasses.replace(start, contestant=COPY)
    one = torch.ones(1, device=clock.device)
    # Ranks start together, and stay in step: none ends a row before the other.
    times = clock.rounds(launches, lambda: dist.all_reduce(one), longest_s=float("inf"))
    every: list[dict[str, Times]] = [{}] * GPUS
    dist.all_gather_object(every, times)
    slowest = {name: max(of_rank[name] for of_rank in every) for name in times}
    ours = slowest["ours"].median if "ours" in slowest else None
    for name, (ms, p20, p80) in slowest.items():
        lines[name] = dataclasses.replace(
            lines[name],
            ms=ms,
            p20=p20,
            p80=p80,
            copy_ms=slowest[COPY].median,
            ours=None if ours is None else ms / ours,
        )
    return list(lines.values())


def worst_of(errors: Sequence[float]) -> float:
    """The largest; nan if one is."""
    return next((error for error in errors if error != error), max(errors))


def make(
    size: tuple[int, int], device: torch.device, rank: int, ranks: int
) -> tuple[Problem, Tensor]:
    """A rank's columns of logits that all ranks draw alike, and the whole logits [S, B, V]."""
    tokens, vocabulary = size
    shape = (tokens // BATCH, BATCH)
    columns = vocabulary // ranks
    random = torch.Generator(device).manual_seed(SEED)
    whole = torch.randn((*shape, vocabulary), device=device, dtype=DTYPE, generator=random).mul_(2)
    tensors = {
        "logits": whole[..., rank * columns : (rank + 1) * columns].contiguous(),
        "targets": torch.randint(vocabulary, shape, device=device, generator=random),
        "token_weight": torch.full(shape, 1 / tokens, device=device),
    }
    return Problem(NAME, BOTH, size, tensors, ("logits",), options={"rank": rank}), whole


def reference(problem: Problem, whole: Tensor) -> Iterator[Expected]:
    """Losses [T]; the gradient [T, V/ranks] of their weighted sum on this rank's columns."""
    columns = problem.tensors["logits"].shape[-1]
    first = problem.options["rank"] * columns
    rows_of = whole.view(-1, whole.shape[-1])
    targets, weight = problem.tensors["targets"].view(-1), problem.tensors["token_weight"].view(-1)
    for rows in row_chunks(*rows_of.shape):
        z, target = rows_of[rows].double(), targets[rows, None]
        log_sum = z.logsumexp(-1, keepdim=True)
        yield 0, rows, (log_sum - z.gather(1, target))[:, 0]
        gradient = (z - log_sum).exp_()
        gradient.scatter_add_(1, target, torch.full_like(target, -1, dtype=gradient.dtype))
        yield 1, rows, gradient[:, first : first + columns] * weight[rows, None]


def build(name: str, problem: Problem) -> Prepared:
    """A contestant's call; its results are the losses and the gradient, as [S, B, ...]."""
    group = dist.group.WORLD
    weight = problem.tensors["token_weight"]
    if name == "ours":
        return _ours(problem, group)
    weighted = dataclasses.replace(problem, gradients=(weight,))
    if name == "megatron":
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

        torch.compiler.reset()
        return Prepared(
            call(
                weighted,
                lambda t: (fused_vocab_parallel_cross_entropy(t["logits"], t["targets"], group),),
            ),
            note="fused",
        )
    if name == "liger":
        from liger_kernel.transformers.vocab_parallel_cross_entropy import (
            LigerVocabParallelCrossEntropy,
        )

        loss = LigerVocabParallelCrossEntropy()
        return Prepared(call(weighted, lambda t: (loss(t["logits"], t["targets"], group),)))
    return _torch(weighted)


def _ours(problem: Problem, group: Any) -> Prepared:
    from megalite.layers.cross_entropy import vocab_parallel_loss_with_grad
    from megalite.parallel.tensor import TensorGroup

    tp = TensorGroup(dist.get_rank(), dist.get_world_size(), group)
    vocabulary = problem.size[1]
    problem, restore = in_place(problem, ["logits"])

    def losses(tensors: Tensors) -> tuple[Tensor, ...]:
        total, each = vocab_parallel_loss_with_grad(
            tensors["logits"], tensors["targets"], tensors["token_weight"], vocabulary, tp
        )
        return total, each

    run = call(problem, losses)
    return Prepared(lambda: run()[1:], restore, "gradient in the logits' place")


def _torch(problem: Problem) -> Prepared:
    """Plain torch, as Megatron's unfused loss: an fp32 softmax that is kept."""
    logits, targets = problem.tensors["logits"], problem.tensors["targets"]
    weight = problem.tensors["token_weight"]
    columns = logits.shape[-1]
    first = problem.options["rank"] * columns

    def run() -> tuple[Tensor, ...]:
        z = logits.float()
        maximum = z.amax(-1)
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
        z -= maximum[..., None]
        local = targets - first
        elsewhere = (local < 0) | (local >= columns)
        local = local.masked_fill(elsewhere, 0)[..., None]
        at_target = z.gather(-1, local)[..., 0].masked_fill(elsewhere, 0.0)
        sums = torch.stack([z.exp_().sum(-1), at_target])
        dist.all_reduce(sums)
        z /= sums[0][..., None]
        z.scatter_add_(-1, local, -(~elsewhere).to(z.dtype)[..., None])
        return sums[0].log() - sums[1], z.mul_(weight[..., None]).to(logits.dtype)

    return Prepared(run)


def _checked(name: str, problem: Problem, whole: Tensor, clock: Clock) -> tuple[Prepared, float]:
    clock.poison(POISONED_BYTES)
    prepared = build(name, problem)
    results = prepared.run()
    flat = tuple(result.flatten(0, 1) for result in results)
    error = largest_error(flat, reference(problem, whole))
    if prepared.restore is not None:
        prepared.restore()
    clock.stream.synchronize()
    return prepared, error
