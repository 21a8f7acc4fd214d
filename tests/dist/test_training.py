"""What must not depend on the layout, beside the loss curve: initial values, dropout, sampling,
averaging over tokens, skipped steps; and how gradients are reduced."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_jobs import save_weights
from pool import RankPool
from runs import SMALL, read_weights, run_in_pool, worst
from worlds import make_groups, make_trainer

from megalite import pretrain
from megalite.config import Config, resolve
from megalite.layers.shard import initialize, named_shards
from megalite.models.llama import LlamaStage
from megalite.models.stage import stage_specs
from megalite.optim.flat import FlatParameters
from megalite.parallel.groups import ParallelGroups
from megalite.sampling import generate, next_token_logits


def save_initial_job(folder: Path, values: dict[str, Any]) -> None:
    save_weights(make_trainer(**values), folder)


LAYOUTS: list[dict[str, Any]] = [
    dict(tp=2),
    dict(tp=4, num_kv_heads=2),
    dict(pp=2),
    dict(dp=2),
    dict(tp=2, pp=2, dp=2, num_kv_heads=1),
    dict(tp=4, pp=2, tie_embeddings=True, pp_layers=(3, 1)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_initial_weights_are_bit_identical(
    pool: RankPool, tmp_path: Path, layout: dict[str, Any]
) -> None:
    model = {k: v for k, v in layout.items() if k in ("num_kv_heads", "tie_embeddings")}
    pool.run(1, save_initial_job, tmp_path / "one", model)
    world = math.prod(layout.get(axis, 1) for axis in ("tp", "pp", "dp"))
    pool.run(world, save_initial_job, tmp_path / "many", layout)
    one, many = read_weights(tmp_path / "one"), read_weights(tmp_path / "many")
    assert one.keys() == many.keys()
    assert one["model.embed_tokens.weight"].shape[0] == 257, "padding is not saved"
    for name, weight in one.items():
        assert torch.equal(many[name], weight), name


DROPOUT = ["--hidden-dropout", "0.2", "--attention-dropout", "0.15"]


@pytest.mark.parametrize(
    "flags",
    [
        "--tp 2",
        "--tp 4 --no-sequence-parallel",
        "--pp 2",
        "--dp 2",
        "--tp 2 --pp 2 --recompute full",
        "--recompute selective",
        "--recompute full",
    ],
)
def test_dropout_does_not_depend_on_layout_or_recompute(
    pool: RankPool, tmp_path: Path, flags: str
) -> None:
    words = flags.split()
    sizes = dict(zip(words[::2], words[1::2], strict=False))
    world = math.prod(int(sizes.get(axis, 1)) for axis in ("--tp", "--pp", "--dp"))
    one = run_in_pool(pool, SMALL + DROPOUT, 1, tmp_path)
    without = run_in_pool(pool, SMALL, 1, tmp_path)
    got = run_in_pool(pool, [*SMALL, *DROPOUT, *words], world, tmp_path)
    assert worst(got.losses, one.losses) <= 1e-5
    assert worst(got.grad_norms, one.grad_norms) <= 1e-4
    assert worst(one.losses, without.losses) > 1e-4, "dropout has an effect"


@pytest.mark.parametrize("recompute", [pytest.param("selective", marks=pytest.mark.full), "full"])
def test_recompute_changes_nothing(pool: RankPool, tmp_path: Path, recompute: str) -> None:
    for layout in (["--tp", "2", "--pp", "2"], []):
        world = 4 if layout else 1
        plain = run_in_pool(pool, SMALL + layout, world, tmp_path)
        again = run_in_pool(pool, [*SMALL, *layout, "--recompute", recompute], world, tmp_path)
        assert again.losses == plain.losses
        assert again.grad_norms == plain.grad_norms


def test_micro_batches_in_reverse_give_the_same_loss(pool: RankPool, tmp_path: Path) -> None:
    forward = run_in_pool(pool, SMALL, 1, tmp_path)
    backward = run_in_pool(pool, [*SMALL, "--reverse-micro-batches"], 1, tmp_path)
    assert worst(backward.losses, forward.losses) <= 1e-6
    assert backward.grad_norms != forward.grad_norms, "the order of summation did change"


def test_bf16_follows_fp32(pool: RankPool, tmp_path: Path) -> None:
    fp32 = run_in_pool(pool, SMALL, 1, tmp_path)
    for layout, world in ([], 1), (["--tp", "2", "--pp", "2"], 4):
        bf16 = run_in_pool(pool, [*SMALL, "--precision", "bf16", *layout], world, tmp_path)
        assert worst(bf16.losses, fp32.losses) <= 2e-3
        assert next(iter(bf16.weights.values())).dtype == torch.bfloat16


def write_ragged_jsonl(path: Path) -> None:
    """Short documents of very different lengths, so that ranks see different numbers of ends."""
    lengths = [1 + (i * i) % 23 if i % 5 else 400 for i in range(900)]
    path.write_text(
        "".join(json.dumps({"text": chr(97 + i % 26) * n}) + "\n" for i, n in enumerate(lengths))
    )


@pytest.mark.parametrize("layout", ["--dp 4", "--dp 2 --pp 2"])
def test_loss_is_averaged_over_tokens_when_ranks_hold_different_counts(
    pool: RankPool, tmp_path: Path, layout: str
) -> None:
    write_ragged_jsonl(tmp_path / "ragged.jsonl")
    flags = [*SMALL, "--data", str(tmp_path / "ragged.jsonl"), "--eod-mask-loss"]
    flags += ["--micro-batch-size", "1", "--seq-length", "16"]
    one = run_in_pool(pool, flags, 1, tmp_path)
    many = run_in_pool(pool, [*flags, *layout.split()], 4, tmp_path)
    assert worst(many.losses, one.losses) <= 1e-6
    assert worst(many.grad_norms, one.grad_norms) <= 1e-5
    unmasked = run_in_pool(pool, [f for f in flags if f != "--eod-mask-loss"], 1, tmp_path)
    assert worst(unmasked.losses, one.losses) > 1e-4, "the mask has an effect"


def counts_job(path: str) -> list[int]:
    trainer = make_trainer(dp=4, data=(path,), eod_mask_loss=True, micro_batch_size=1)
    return [int(trainer.loader.train_batch(step).counted_tokens) for step in range(3)]


def test_ranks_of_that_corpus_do_hold_different_counts(pool: RankPool, tmp_path: Path) -> None:
    write_ragged_jsonl(tmp_path / "ragged.jsonl")
    outcomes = pool.run(4, counts_job, str(tmp_path / "ragged.jsonl"))
    assert len({tuple(outcome.value) for outcome in outcomes}) > 1


def test_a_short_validation_split_counts_each_sample_once(pool: RankPool, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("".join(f"line {i} of a short text\n" for i in range(800)))
    flags = [*SMALL, "--data", str(text), "--split", "75,25", "--eval-steps", "100"]
    one = run_in_pool(pool, [*flags, "--micro-batch-size", "1"], 1, tmp_path)
    for layout, world in ("--dp 4", 4), ("--dp 2 --pp 2", 4):
        many = run_in_pool(pool, [*flags, *layout.split()], world, tmp_path)
        assert worst(many.valid_losses, one.valid_losses) <= 1e-6


def logits_job(lengths: list[int], values: dict[str, Any]) -> Any:
    trainer = make_trainer(**values)
    found = []
    for length in lengths:
        logits = next_token_logits(trainer, list(range(40, 40 + length)))
        found.append(None if logits is None else logits.tolist())
    return found, generate(trainer, [100], 20)


GENERATING = [
    *(dict(tp=4), dict(tp=2, pp=2), dict(pp=2, dp=2)),
    *(dict(tp=2, pp=2, schedule="zb-v"), dict(pp=4, schedule="interleaved")),
]


@pytest.mark.parametrize("layout", GENERATING, ids=str)
def test_generation_at_odd_lengths_equals_one_rank(pool: RankPool, layout: dict[str, Any]) -> None:
    lengths = [1, 2, 3, 5, 7, 15, 16]
    want, want_tokens = pool.run(1, logits_job, lengths, {})[0].value
    outcomes = pool.run(4, logits_job, lengths, layout)
    assert any(outcome.value[0][0] is not None for outcome in outcomes), "the last stage's ranks"
    for outcome in outcomes:
        found, tokens = outcome.value
        assert tokens == want_tokens
        for ours, theirs in zip(found, want, strict=True):
            if ours is not None:
                torch.testing.assert_close(
                    torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-5
                )


def disagree_job(flags: list[str]) -> int:
    import os

    rank = int(os.environ["RANK"])
    return pretrain.main([*flags, "--lr", "1e-3" if rank != 2 else "2e-3"])


def test_ranks_with_different_configurations_say_which_field_differs(
    pool: RankPool, tmp_path: Path
) -> None:
    flags = [*SMALL, "--pp", "2", "--dp", "2", "--runs", str(tmp_path), "--device", "cpu"]
    outcomes = pool.run(4, disagree_job, flags)
    assert [outcome.value for outcome in outcomes] == [2] * 4
    messages = [outcome.stderr for outcome in outcomes if outcome.stderr]
    assert messages == [
        "megalite: ranks disagree on train.lr: rank 0 has 0.001, rank 2 has 0.002\n"
    ]


def invalid_job(flags: list[str], wrong: dict[int, list[str]]) -> int:
    import os

    return pretrain.main([*flags, *wrong.get(int(os.environ["RANK"]), [])])


@pytest.mark.parametrize(
    ("wrong", "sentences"),
    [
        (
            {1: ["--seq-length", "127"]},
            ["--seq-length 127 is not a multiple of --tp 2", "(rank 1)"],
        ),
        ({0: ["--bogus"]}, ["unknown flag --bogus; see --help (rank 0)"]),
        ({1: ["--data", "/no/such/file.txt"]}, ["there is no file /no/such/file.txt", "(rank 1)"]),
        (
            {0: ["--pp", "3"], 1: ["--lr", "x"]},
            ["torchrun started 2 ranks, but --tp 2 x --pp 3", "--lr x: expected a number (rank 1)"],
        ),
        ({0: ["--device", "cuda"], 1: ["--device", "cuda"]}, ["--device cuda: 0 GPUs for 2 ranks"]),
    ],
    ids=str,
)
def test_all_ranks_learn_what_is_wrong_with_one(
    pool: RankPool, tmp_path: Path, wrong: dict[int, list[str]], sentences: list[str]
) -> None:
    flags = [*SMALL, "--tp", "2", "--runs", str(tmp_path)]
    outcomes = pool.run(2, invalid_job, flags, wrong, timeout=60)
    assert [outcome.value for outcome in outcomes] == [2, 2]
    assert outcomes[1].stderr == ""
    assert "Traceback" not in outcomes[0].stderr
    for sentence in sentences:
        assert sentence in outcomes[0].stderr
    assert not list(tmp_path.iterdir()), "no folder is left behind"


def skipped_step_job() -> dict[str, Any]:
    trainer = make_trainer(tp=2, pp=2)
    trainer.train_step(0)
    before = trainer.flat.whole(trainer.flat.own_parameters)
    if trainer.groups.world_rank == 3:
        # One rank's activation gradient overflows in this step.
        (stage,) = trainer.stages.values()
        parameter = next(stage.parameters())
        handle = parameter.register_hook(lambda gradient: gradient * torch.inf)
    norm, loss, _ = trainer.train_step(1).tolist()
    same = torch.equal(before, trainer.flat.whole(trainer.flat.own_parameters))
    if trainer.groups.world_rank == 3:
        handle.remove()
    next_norm, *_ = trainer.train_step(2).tolist()
    moved = not torch.equal(before, trainer.flat.whole(trainer.flat.own_parameters))
    return dict(norm=norm, loss=loss, same=same, next_norm=next_norm, moved=moved)


def test_a_gradient_that_is_not_finite_skips_the_step_on_all_ranks(pool: RankPool) -> None:
    for outcome in pool.run(4, skipped_step_job):
        seen = outcome.value
        assert not math.isfinite(seen["norm"])
        assert math.isfinite(seen["loss"])
        assert seen["same"], "no weight moved"
        assert math.isfinite(seen["next_norm"])
        assert seen["moved"], "training goes on"


def make_stage(groups: ParallelGroups) -> LlamaStage:
    config = resolve(Config().replace(hidden_size=32, ffn_hidden_size=48, seq_length=16))
    (spec,) = stage_specs(config)
    stage = LlamaStage(config, spec, tp=groups.tp, dtype=torch.float64, device=torch.device("cpu"))
    initialize(stage, 5)
    return stage


def buckets_job() -> list[int]:
    """Two micro-batches on each of two data ranks; returns the buckets in flight at the end."""
    groups = make_groups(dp=2)
    tokens = torch.randint(0, 257, (4, 2, 17), generator=torch.Generator().manual_seed(1))

    def loss(stage: LlamaStage, index: int) -> torch.Tensor:
        inputs, labels = tokens[index, :, :-1], tokens[index, :, 1:]
        return stage.token_losses(stage(inputs), labels).sum()

    plain = make_stage(groups)
    sum(loss(plain, index) for index in range(4)).backward()  # type: ignore[union-attr]

    stage = make_stage(groups)
    flat = FlatParameters({0: stage}, groups, bucket_elements=4000)
    flat.zero_gradients()
    in_flight: list[int] = []
    stage.embedding.weight.register_post_accumulate_grad_hook(
        lambda _: in_flight.append(
            sum(closing.pending is not None for closing in flat._gradients._closing)
        )
    )
    loss(stage, 2 * groups.dp.rank).backward()
    flat.begin_last_gradients(0, deferred=False)
    loss(stage, 2 * groups.dp.rank + 1).backward()
    flat.end_last_gradients(0)
    flat.finish_reduction()
    want = {shard.pieces[0].name: p.grad for p, shard in named_shards(plain)}
    whole = flat.whole(flat.own_gradients)
    for slot in flat.slots:
        torch.testing.assert_close(
            slot.of(whole), want[slot.shard.pieces[0].name], rtol=0, atol=1e-13
        )
    return [*in_flight, len(flat._buckets)]


def test_gradient_buckets_are_reduced_during_the_last_backward(pool: RankPool) -> None:
    for outcome in pool.run(2, buckets_job):
        before_last, in_last, buckets = outcome.value
        assert buckets > 4
        assert before_last == 0, "nothing is reduced before the last micro-batch"
        assert in_last >= buckets - 2, "all but the last buckets are under way when backward ends"


def lost_collective_job() -> float:
    groups = make_groups(tp=2, pp=2, distributed_timeout_minutes=0.03)
    started = time.monotonic()
    if groups.tp.rank == 0:
        with pytest.raises(RuntimeError):
            groups.tp.all_reduce(torch.ones(1))
    else:
        time.sleep(6.0)
    return time.monotonic() - started


def test_the_limit_of_a_collective_holds_on_every_axis(pool: RankPool) -> None:
    outcomes = pool.run(4, lost_collective_job)
    assert all(outcome.value < 5 for outcome in outcomes[::2])


@pytest.mark.parametrize("order", ["epoch", "megatron"])
def test_a_blend_is_the_same_on_one_rank_and_on_two(
    pool: RankPool, tmp_path: Path, order: str
) -> None:
    for name in "ab":
        lines = (f"{number} lines of {name}\n" * 3 for number in range(400))
        (tmp_path / f"{name}.txt").write_text("".join(lines))
    blend = ["--data", "0.7", f"{tmp_path}/a.txt", "0.3", f"{tmp_path}/b.txt"]
    flags = [*SMALL, *blend, "--data-order", order, "--data-cache-path", f"{tmp_path}/cache"]
    flags += ["--split", "80,20", "--eval-steps", "2"]
    one = run_in_pool(pool, flags, 1, tmp_path)
    two = run_in_pool(pool, [*flags, "--dp", "2"], 2, tmp_path)
    smaller = run_in_pool(pool, [*flags, "--micro-batch-size", "1"], 1, tmp_path)
    for other in (two, smaller):
        assert worst(other.losses, one.losses) <= 1e-6
        assert worst(other.grad_norms, one.grad_norms) <= 1e-5
        assert worst(other.valid_losses, one.valid_losses) <= 1e-6
    alone = run_in_pool(pool, [*SMALL, "--data", f"{tmp_path}/a.txt"], 1, tmp_path)
    assert worst(alone.losses, one.losses) > 1e-4, "the blend has an effect"
