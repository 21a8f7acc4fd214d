"""Flags that would do nothing under the others are errors; on an axis of one rank, notes."""

from __future__ import annotations

import pytest
from commands import parse, run, violations

from megalite.config import resolve
from megalite.effects import notes
from megalite.parallel.environment import World

WITHOUT_EFFECT = {
    "--rope-scaling-factor 4": "without --rope-scaling",
    "--rope-low-freq-factor 2": "without --rope-scaling llama3",
    "--rope-high-freq-factor 5": "without --rope-scaling llama3",
    "--rope-original-seq-length 64": "without --rope-scaling llama3 or yarn",
    "--rope-yarn-beta-fast 16": "without --rope-scaling yarn",
    "--rope-yarn-beta-slow 2": "without --rope-scaling yarn",
    "--rope-yarn-attention-factor 1.2": "without --rope-scaling yarn",
    "--lr-wsd-decay-steps 5": "without --lr-decay-style WSD",
    "--lr-wsd-decay-iters 5": "without --lr-decay-style WSD",
    "--lr-wsd-decay-style linear": "without --lr-decay-style WSD",
    "--min-lr 1e-5": "which never decays",
    "--loss-scale 128": "without --precision fp16",
    "--initial-loss-scale 128": "without --precision fp16",
    "--min-loss-scale 2": "without --precision fp16",
    "--loss-scale-window 100": "without --precision fp16",
    "--hysteresis 3": "without --precision fp16",
    "--lr-decay-steps 50": "with --lr-decay-style constant, unless",
    "--spike-window 9": "without --skip-spikes",
    "--eval-interval 5": "with --eval-steps 0",
    "--reverse-micro-batches": "with a --global-batch-size of one micro-batch",
    "--split 90,10": "with --mock-data",
    "--data-cache-path somewhere": "without text",
    "--packing best-fit": "with --mock-data, which has no documents to pack",
    "--fim-spm-rate 0.3": "without --fim-rate",
    "--fim-prefix-token x": "without --fim-rate",
    "--fim-middle-token x": "without --fim-rate",
    "--fim-suffix-token x": "without --fim-rate",
    "--sample-length 9": "without text",
    "--tokenizer-type ByteTokenizer": "with --mock-data and --vocab-size",
    "--tokenizer-model x": "without --tokenizer-type SentencePieceTokenizer or",
    "--vocab-file x": "without --tokenizer-type GPT2BPETokenizer",
    "--merge-file x": "without --tokenizer-type GPT2BPETokenizer",
    "--tiktoken-pattern v2": "without --tokenizer-type TikTokenizer",
    "--tiktoken-num-special-tokens 9": "without --tiktoken-pattern v1 or v2",
}
REST = {
    "--min-lr 1e-5": "--lr-decay-style constant",
    "--lr-decay-steps 50": "--lr-decay-style constant --lr-warmup-steps 3",
    "--eval-interval 5": "--eval-steps 0",
    "--reverse-micro-batches": "--global-batch-size 8 --micro-batch-size 8",
    "--split 90,10": "--mock-data",
    "--data-cache-path somewhere": "--mock-data",
    "--packing best-fit": "--mock-data",
    "--sample-length 9": "--mock-data",
    "--tokenizer-type ByteTokenizer": "--mock-data --vocab-size 300",
}
WITH_EFFECT = [
    *(
        f"--rope-scaling {'yarn' if 'yarn' in flag else 'llama3'} {flag}"
        for flag in WITHOUT_EFFECT
        if "--rope" in flag
    ),
    "--rope-scaling linear --rope-scaling-factor 2",
    "--rope-scaling yarn --rope-original-seq-length 64",
    *(f"--lr-decay-style WSD {flag}" for flag in WITHOUT_EFFECT if "wsd" in flag),
    "--min-lr 1e-5",
    "--fp16 --loss-scale 128",
    "--fp16 --initial-loss-scale 128 --min-loss-scale 2 --loss-scale-window 100 --hysteresis 3",
    "--fp16 --initial-loss-scale 128 --loss-scale 0",
    "--loss-scale 0 --precision bf16",
    "--lr-decay-steps 50",
    "--lr-decay-steps 50 --lr-decay-style constant",
    "--eval-interval 5",
    "--reverse-micro-batches",
    "--split 90,10",
    "--data-cache-path somewhere",
    "--packing best-fit",
    "--sample-length 9",
    "--tokenizer-type ByteTokenizer",
    "--tokenizer-type ByteTokenizer --mock-data",
    "--tokenizer-type NullTokenizer --mock-data --vocab-size 300",
    # What switches something off asks for nothing.
    "--eval-interval 0 --eval-steps 0",
    "--min-lr 0 --lr-decay-style constant",
    "--sample-length 0 --mock-data",
    "--fim-spm-rate 0",
    "--no-reverse-micro-batches --global-batch-size 8",
]


@pytest.mark.parametrize("flag", WITHOUT_EFFECT)
def test_a_flag_without_effect(flag: str) -> None:
    (sentence,) = violations(*flag.split(), *REST.get(flag, "").split())
    assert sentence.startswith(f"{flag} has no effect {WITHOUT_EFFECT[flag]}"[: len(flag) + 14])
    assert WITHOUT_EFFECT[flag] in sentence and sentence.endswith("; leave it out")


@pytest.mark.parametrize("words", WITH_EFFECT)
def test_the_same_flag_with_effect(words: str) -> None:
    run(*words.split())


@pytest.mark.parametrize(
    "flag",
    ["--initial-loss-scale 9", "--min-loss-scale 2", "--loss-scale-window 9", "--hysteresis 3"],
)
def test_a_constant_loss_scale_has_no_dynamics(flag: str) -> None:
    assert violations("--fp16", "--loss-scale", "16", *flag.split()) == [
        f"{flag} has no effect with --loss-scale, which never changes; leave it out"
    ]


def test_presets_and_files_may_set_what_has_no_effect(tmp_path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[train]\nlr_wsd_decay_steps = 5\n")
    run("--config", str(file))
    # The preset validates every 250 steps.
    run("--model", "1b", "--eval-steps", "0")


def told(words: str) -> tuple[str, ...]:
    command = parse(*words.split())
    run(*words.split())
    return notes(resolve(command.config), command.given)


@pytest.mark.parametrize(
    ("flag", "axis"),
    [
        ("--sequence-parallel", "with --tp 1"),
        ("--schedule gpipe", "with --pp 1"),
        ("--pp-layers 4", "with --pp 1"),
        ("--post-validation", "with --pp 1"),
        ("--grad-reduce-dtype bf16", "with dp 1"),
        ("--start-timeout 5", "on one rank without --max-restarts: nothing watches it"),
        ("--save-timeout 5", "on one rank without --max-restarts: nothing watches it"),
        ("--check-replicas 5", "with dp 1"),
        ("--step-timeout 5", "on one rank without --max-restarts: nothing watches it"),
        ("--distributed-timeout-minutes 5", "on one rank, which waits for nobody"),
    ],
)
def test_parallel_features_on_one_rank_are_notes(flag: str, axis: str) -> None:
    assert told(flag) == (f"{flag} has no effect {axis}",)
    rest = " --pp-layers 2,2" if "--pp-layers" in flag else f" {flag}"
    assert told(f"--tp 2 --pp 2 --dp 2{rest}") == ()
    assert told("--grad-reduce-dtype auto") == ()


@pytest.mark.parametrize(
    "flags", ["--schedule zb-v", "--chunks 2 --schedule gpipe", "--chunks 2 --pp-layers 1.5,2.5"]
)
def test_several_stages_on_one_rank_are_a_pipeline(flags: str) -> None:
    assert told(flags) == ()


def test_a_loss_that_is_not_scaled_on_purpose_is_a_note() -> None:
    (note,) = told("--fp16 --loss-scale 1")
    assert note.startswith("--loss-scale 1: the loss is not scaled")
    assert told("--fp16 --loss-scale 2") == told("--fp16") == ()


def test_nothing_is_said_of_what_is_off() -> None:
    assert told("--no-sequence-parallel") == ()


def test_other_problems_come_first() -> None:
    """What a flag does depends on flags whose meaning is not known yet."""
    assert violations("--lr-decay-style", "WDS", "--lr-wsd-decay-steps", "5") == [
        "--lr-decay-style WDS: expected one of cosine, linear, constant, WSD"
    ]
    # Those that do not depend on what is wrong are told with it.
    found = violations("--lr-decay-style", "WDS", "--rope-scaling-factor", "5", "--tp", "0")
    assert len(found) == 3 and "--rope-scaling-factor 5 has no effect" in found[-1]


def test_a_launcher_starts_its_ranks_again_itself() -> None:
    world = World(0, 2, "", "127.0.0.1", 29500, "", "torchrun")
    assert violations("--tp", "2", "--max-restarts", "3", ranks=world) == [
        "--max-restarts 3 has no effect under torchrun, which starts the ranks; leave it out, and "
        "have that start them again"
    ]
    run("--tp", "2", "--max-restarts", "3")
