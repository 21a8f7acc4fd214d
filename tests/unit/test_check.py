"""Each rule across the fields has a configuration that breaks it alone; its sentence names the
flag, the value and the nearest valid choices; all violations of a run are reported together."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from commands import run, violations

from megalite import check as check_module
from megalite.parallel.environment import World
from megalite.presets import PRESETS


def world(size: int, launcher: str = "torchrun") -> World:
    return World(0, size, "", "127.0.0.1", 29500, "", launcher)


POSITIVE = """num-layers hidden-size num-attention-heads ffn-hidden-size seq-length micro-batch-size
make-vocab-size-divisible-by rope-theta rope-scaling-factor rope-original-seq-length
rope-yarn-beta-fast rope-yarn-beta-slow norm-epsilon
tp pp distributed-timeout-minutes lr adam-eps log-interval
initial-loss-scale min-loss-scale loss-scale-window hysteresis""".split()
POSITIVE_OR_DERIVED = """num-kv-heads head-dim vocab-size dp global-batch-size
rope-yarn-attention-factor loss-scale""".split()
NOT_NEGATIVE = """min-lr init-method-std weight-decay clip-grad lr-decay-steps lr-wsd-decay-steps
skip-spikes spike-window eval-interval eval-steps sample-length steps tokens seed""".split()


@pytest.mark.parametrize("value", ["0", "-3"])
@pytest.mark.parametrize("name", POSITIVE)
def test_what_must_be_above_0(name: str, value: str) -> None:
    assert f"--{name} {value} must be above 0" in [
        sentence.replace(f"{value}.0 ", f"{value} ") for sentence in violations(f"--{name}", value)
    ]


@pytest.mark.parametrize("name", POSITIVE_OR_DERIVED)
def test_what_must_be_above_0_where_0_is_derived(name: str) -> None:
    found = [sentence.replace("-3.0 ", "-3 ") for sentence in violations(f"--{name}", "-3")]
    assert f"--{name} -3 must be above 0" in found
    run(f"--{name}", "0")


@pytest.mark.parametrize("value", ["-3", "-2000000000"])
@pytest.mark.parametrize("name", NOT_NEGATIVE)
def test_what_must_not_be_negative(name: str, value: str) -> None:
    argv = [f"--{name}", value, *(["--steps", "0"] if name == "tokens" else [])]
    found = [sentence.replace(f"{value}.0 ", f"{value} ") for sentence in violations(*argv)]
    assert f"--{name} {value} must not be negative" in found


PROBABILITIES = "hidden-dropout attention-dropout adam-beta1 adam-beta2 lr-warmup-fraction".split()


@pytest.mark.parametrize("value", ["-0.5", "1.0", "1.5", "nan", "inf"])
@pytest.mark.parametrize("name", PROBABILITIES)
def test_what_must_be_a_share(name: str, value: str) -> None:
    found = violations(f"--{name}", value)
    assert f"--{name} {value} must be at least 0 and below 1" in found


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize(
    "name",
    [
        *("lr", "min-lr", "weight-decay", "norm-epsilon", "rope-theta", "init-method-std"),
        *("loss-scale", "initial-loss-scale", "min-loss-scale"),
    ],
)
def test_numbers_that_are_not_finite_are_refused(name: str, value: str) -> None:
    assert any(f"--{name} {value} " in sentence for sentence in violations(f"--{name}", value))


@pytest.mark.parametrize(
    ("argv", "starts"),
    [
        (
            "--bogus --tp 3",
            ["unknown flag --bogus", "--tp 3 does not divide --num-attention-heads"],
        ),
        ("--lr 0 --tp 3", ["--lr 0.0 must be above 0", "--tp 3 does not divide --num-att"]),
        ("--lr x --tp 3", ["--lr x: expected a number", "--tp 3 does not divide --num-att"]),
        # What a wrong value leaves open is not judged.
        ("--num-layers x --pp 8", ["--num-layers x: expected"]),
        ("--num-layer 8 --pp 8", ["unknown flag --num-layer; did you mean --num-layers?"]),
        ("--num-layers 0 --pp 8", ["--num-layers 0 must be above 0"]),
        ("--num-layers 8 --num-layers= --pp 8", ["--num-layers : expected"]),
        ("--model gpt --pp 8", ["--model gpt is not a preset"]),
        ("--config /no/such.toml --pp 8", ["--config /no/such.toml cannot be read"]),
        ("--tp", ["--tp needs a value"]),
        ("--micro-batch-size -2 --global-batch-size 33", ["--micro-batch-size -2 must be above 0"]),
        ("--hidden-size -5 --lr 0", ["--hidden-size -5 must be", "--lr 0.0 must be above 0"]),
    ],
)
def test_words_and_values_are_judged_together(argv: str, starts: list[str]) -> None:
    found = [v for v in violations(*argv.split()) if "--ffn" not in v and "--seq-length" not in v]
    assert len(found) == len(starts), found
    for sentence, start in zip(found, starts, strict=True):
        assert sentence.startswith(start)


RULES = {
    "kv heads divide heads": (
        "--num-attention-heads 12 --hidden-size 96 --num-kv-heads 5",
        "--num-kv-heads 5 does not divide --num-attention-heads 12; try 2, 3, 4, 6",
    ),
    "tp divides heads": (
        "--tp 3 --ffn-hidden-size 384 --seq-length 129",
        "--tp 3 does not divide --num-attention-heads 4 (each tensor rank owns whole heads); "
        "try 1, 2, 4",
    ),
    "tp and kv heads": (
        "--num-attention-heads 12 --hidden-size 96 --num-kv-heads 4 --tp 6 --ffn-hidden-size 384 "
        "--seq-length 126",
        "--tp 6 and --num-kv-heads 4: one must divide the other (a key/value head is whole on a "
        "rank, or copied on equally many); try 1, 2, 4, 12",
    ),
    "even head dim": (
        "--head-dim 33",
        "--head-dim 33 must be even: RoPE turns pairs of features",
    ),
    "heads divide hidden size": (
        "--hidden-size 130",
        "--num-attention-heads 4 does not divide --hidden-size 130; try 1, 2, 5, 10, "
        "or give --head-dim",
    ),
    "tp divides ffn": (
        "--tp 4 --ffn-hidden-size 354",
        "--tp 4 does not divide --ffn-hidden-size 354; try 1, 2, 3, 6",
    ),
    "tp divides the sequence": (
        "--tp 4 --seq-length 126",
        "--seq-length 126 is not a multiple of --tp 4, as sequence parallelism needs; "
        "try 124 or 128, or give --no-sequence-parallel",
    ),
    "tp divides a short sequence": (
        "--tp 4 --seq-length 3",
        "--seq-length 3 is not a multiple of --tp 4, as sequence parallelism needs; "
        "try 4, or give --no-sequence-parallel",
    ),
    "rope factors": (
        "--use-rope-scaling --rope-high-freq-factor 1.5 --rope-low-freq-factor 2",
        "--rope-high-freq-factor 1.5 must be above --rope-low-freq-factor 2.0",
    ),
    "equal rope factors": (
        "--use-rope-scaling --rope-high-freq-factor 2 --rope-low-freq-factor 2",
        "--rope-high-freq-factor 2.0 must be above --rope-low-freq-factor 2.0",
    ),
    "yarn base": (
        "--rope-scaling yarn --rope-theta 1",
        "--rope-theta 1.0 must be above 1 with --rope-scaling yarn",
    ),
    "yarn turns": (
        "--rope-scaling yarn --rope-yarn-beta-fast 1",
        "--rope-yarn-beta-fast 1.0 must be above --rope-yarn-beta-slow 1.0",
    ),
    "batch": (
        "--dp 2 --micro-batch-size 4 --global-batch-size 20",
        "--global-batch-size 20 is not a multiple of --micro-batch-size 4 x dp 2 = 8; try 16 or 24",
    ),
    "small batch": (
        "--dp 2 --micro-batch-size 4 --global-batch-size 4",
        "--global-batch-size 4 is not a multiple of --micro-batch-size 4 x dp 2 = 8; try 8",
    ),
    "no steps": ("--steps 0", "--steps 0 trains nothing: give --steps, --tokens or --num-epochs"),
    "warm-up": (
        "--steps 10 --lr-warmup-steps 10",
        "--lr-warmup-steps 10 must be below the 10 steps of the learning-rate schedule",
    ),
    "warm-up and decay": (
        "--steps 100 --lr-decay-steps 20 --lr-warmup-steps 30",
        "--lr-warmup-steps 30 must be below the 20 steps of the learning-rate schedule",
    ),
    "smallest loss scale": (
        "--fp16 --min-loss-scale 32 --initial-loss-scale 16",
        "--min-loss-scale 32.0 is above --initial-loss-scale 16.0",
    ),
    "a loss scale that fp32 does not hold": (
        "--fp16 --loss-scale 1e-40",
        "--loss-scale 1e-40 is below 1.2e-38, the least of fp32",
    ),
    "smallest rate": ("--min-lr 0.5", "--min-lr 0.5 is above --lr 0.004"),
    "WSD": (
        "--steps 10 --lr-warmup-steps 2 --lr-decay-style WSD --lr-wsd-decay-steps 9",
        "--lr-wsd-decay-steps 9 is longer than the 8 steps after warm-up",
    ),
    **{
        f"split {split!r}": (
            f"--split={split}",
            f"--split {split}: expected two or three shares separated by commas, the first above "
            "0, as in 95,5 or 969,30,1",
        )
        for split in ("95", "1,2,3,4", "0,5", "95,", "-1,2", "x,y", "95;5", "1e2,5", "nan,1")
    },
    "vocabulary of bytes": (
        "--vocab-size 256",
        "--vocab-size 256 is below the 257 tokens of ByteTokenizer",
    ),
    **{
        f"name {name!r}": (
            f"--name {name}",
            f"--name {name!r} must be one folder name: letters, digits, '.', '_', '+', '-', "
            "starting with a letter or digit",
        )
        for name in ("a/b", "../x", ".", "..", ".hidden", "_x", "/abs", "ünïcode")
    },
    "fp64 in another precision": (
        "--precision fp64 --grad-reduce-dtype bf16",
        "--grad-reduce-dtype bf16 and --precision fp64: an fp64 run is fp64 throughout; leave it "
        "out, or give --precision fp32",
    ),
    **{
        f"fp64 with moments in {name}": (
            f"--precision fp64 --moments-dtype {name}",
            f"--moments-dtype {name} and --precision fp64: an fp64 run is fp64 throughout; leave "
            "it out, or give --precision fp32",
        )
        for name in ("bf16", "fp32")
    },
    "fp16 without a loss scale": (
        "--precision bf16 --grad-reduce-dtype fp16",
        "--grad-reduce-dtype fp16 without --precision fp16: fp16 rounds gradients below 3e-8 to "
        "zero, and only fp16 runs scale their loss; give --grad-reduce-dtype bf16",
    ),
    "steps and tokens": ("--steps 5 --tokens 1e6", "--steps and --tokens contradict: give one"),
    "warm-up twice": (
        "--lr-warmup-steps 5 --lr-warmup-fraction 0.2",
        "--lr-warmup-steps and --lr-warmup-fraction contradict: give one",
    ),
    "no warm-up and a share of it": (
        "--lr-warmup-steps 0 --lr-warmup-fraction 0.2",
        "--lr-warmup-steps and --lr-warmup-fraction contradict: give one",
    ),
    "data twice": (
        "--data x.txt --mock-data",
        "--data and --mock-data contradict: give one",
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_one_broken_rule_is_one_sentence(rule: str) -> None:
    argv, sentence = RULES[rule]
    assert violations(*argv.split()) == [sentence]


VALID = """
--num-attention-heads 12 --hidden-size 96 --num-kv-heads 4 --tp 12 --ffn-hidden-size 384 @s 120
--num-attention-heads 12 --hidden-size 96 --num-kv-heads 4 --tp 2
--num-kv-heads 1 --tp 4
--hidden-size 130 --head-dim 16
--hidden-size 130 --head-dim 32
--tp 4 --seq-length 126 --no-sequence-parallel
--tp 1 --seq-length 127
--rope-high-freq-factor 2 --rope-low-freq-factor 1 --rope-scaling llama3
--rope-yarn-beta-fast 2 --rope-scaling yarn
--pp 4
--pp 3 --pp-layers 1,2,1
--dp 2 --micro-batch-size 4 --global-batch-size 24
--steps 10 --lr-warmup-steps 9
--steps 100 --lr-decay-steps 200 --lr-warmup-steps 150
--steps 10 --lr-decay-style WSD --lr-wsd-decay-steps 8 --lr-warmup-steps 2
--steps 1 --lr-decay-style WSD
--min-lr 0.004
--lr-warmup-fraction 0
--lr-warmup-steps -1 --lr-warmup-fraction 0.2
--lr-warmup-steps 5 --no-mock-data
--split 1,0
--split 969,30,1
--split 0.95,0.05
--vocab-size 257
--mock-data --vocab-size 7
--name 2024.Run_a+b-c
--clip-grad 0 --weight-decay 0 --eval-steps 0 --sample-length 0 --seed 0 --min-lr 0
--hidden-dropout 0 --attention-dropout 0.999 --adam-beta1 0
--fp16 --loss-scale 1
--fp16 --loss-scale 0 --initial-loss-scale 4294967296 --min-loss-scale 4294967296
--fp16 --loss-scale-window 1 --hysteresis 1
--fp16 --pp 2 --post-validation
--fp16 --dp 2 --grad-reduce-dtype fp16
--precision fp64 --grad-reduce-dtype auto --moments-dtype auto
--precision fp32 --moments-dtype bf16
--precision bf16-pure --moments-dtype fp32 --dp 2 --grad-reduce-dtype bf16
--fp16 --moments-dtype bf16 --pp 2 --post-validation
""".strip().splitlines()


@pytest.mark.parametrize("argv", VALID)
def test_what_is_just_valid(argv: str) -> None:
    run(*argv.replace("@s", "--seq-length").split())


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (
            "--tp 3 --pp 9 --num-kv-heads 3 --split 5 --name a/b --steps 0 --adam-beta1 2 "
            "--data missing.txt",
            [
                *(
                    "--adam-beta1 2.0",
                    "--num-kv-heads 3 does not divide",
                    "--tp 3 does not divide --num-attention-heads",
                ),
                *(
                    "--ffn-hidden-size 352; try",
                    "--seq-length 128",
                    "--pp 9 makes 9 stages",
                    "--steps 0",
                ),
                *("--split 5", "there is no file missing.txt", "--name 'a/b'"),
            ],
        ),
        (
            "--tp 0 --pp -1 --lr 0 --seed -1 --clip-grad -1",
            ["--tp 0", "--pp -1", "--lr 0.0", "--seed -1", "--clip-grad -1.0"],
        ),
    ],
)
def test_all_violations_are_reported_together(argv: str, parts: list[str]) -> None:
    found = violations(*argv.split())
    assert len(found) == len(parts), found
    assert [part for part in parts if sum(part in sentence for sentence in found) != 1] == []


# Length of a run, given in tokens


@pytest.mark.parametrize("steps_from", ["preset", "file"])
def test_tokens_take_the_place_of_steps_that_no_flag_gave(tmp_path: Path, steps_from: str) -> None:
    (tmp_path / "a.toml").write_text("steps = 7\n" if steps_from == "file" else "")
    config = run(
        *("--config", str(tmp_path / "a.toml"), "--tokens", "1e6", "--global-batch-size", "32")
    )
    assert config.train.steps == 245  # 1,000,000 / (32 x 128), rounded up


# Presets

LAYOUTS = {
    "tiny": ["--tp 2 --pp 2 --dp 2", "--tp 4 --pp 4", "--dp 4"],
    "125m": ["--tp 4 --pp 2 --dp 8", "--pp 12"],
    "1b": ["--tp 8 --pp 4 --dp 2", "--tp 32"],
    "llama2-7b": ["--tp 8 --pp 4 --dp 4"],
    "llama2-13b": ["--tp 8 --pp 5 --dp 4"],
    "llama2-70b": ["--tp 8 --pp 16 --dp 4", "--tp 16 --pp 8"],
    "llama3-8b": ["--tp 8 --pp 4 --dp 4"],
    "llama3-70b": ["--tp 8 --pp 16 --dp 4"],
    "llama3.1-8b": ["--tp 4 --pp 2 --dp 8"],
    "llama3.1-70b": ["--tp 8 --pp 20 --dp 2"],
    "llama3.1-405b": ["--tp 8 --pp 16 --dp 8", "--tp 16 --pp 18"],
    "llama3.2-1b": ["--tp 8 --pp 2 --dp 8"],
    "llama3.2-3b": ["--tp 8 --pp 2 --dp 8", "--tp 4 --pp 28"],
}


@pytest.mark.parametrize(("preset", "layout"), [(p, x) for p in PRESETS for x in ["", *LAYOUTS[p]]])
def test_presets_pass(preset: str, layout: str) -> None:
    config = run("--model", preset, *layout.split())
    assert config.num_micro_batches >= 1
    assert config.train.steps > 0


# Launchers


@pytest.mark.parametrize(
    ("argv", "ranks", "sentence"),
    [
        (
            "--tp 2 --dp 2",
            world(8),
            "torchrun started 8 ranks, but --tp 2 x --pp 1 x --dp 2 = 4: "
            "give --dp 4 or leave it out",
        ),
        (
            "--pp 3",
            world(8, "srun"),
            "srun started 8 ranks, but --tp 1 x --pp 3 x --dp 2 = 6: --tp x --pp = 3 must divide 8",
        ),
        (
            "--tp 4 --pp 4",
            world(8),
            "torchrun started 8 ranks, but --tp 4 x --pp 4 x --dp 1 = 16: "
            "--tp x --pp = 16 must divide 8",
        ),
        (
            "--dp 2",
            world(1),
            "torchrun started 1 ranks, but --tp 1 x --pp 1 x --dp 2 = 2: "
            "give --dp 1 or leave it out",
        ),
    ],
)
def test_the_layout_must_fit_the_launchers_ranks(argv: str, ranks: World, sentence: str) -> None:
    assert violations(*argv.split(), ranks=ranks) == [sentence]


@pytest.mark.parametrize(
    ("argv", "size", "dp"), [("--tp 2 --pp 2", 8, 2), ("--dp 4", 4, 4), ("--pp 4", 4, 1)]
)
def test_a_layout_that_fits_the_launchers_ranks(argv: str, size: int, dp: int) -> None:
    assert run(*argv.split(), ranks=world(size)).parallel.dp == dp


# Data


def files(folder: Path, **contents: bytes) -> None:
    for name, content in contents.items():
        (folder / name.replace("_", ".")).write_bytes(content)


@pytest.mark.parametrize(
    ("data", "sentences"),
    [
        ("no.txt", ["--data {f}/no.txt: there is no file {f}/no.txt; beside it: {beside}"]),
        ("no.jsonl", ["--data {f}/no.jsonl: there is no file {f}/no.jsonl; beside it: {beside}"]),
        ("no/a.txt", ["--data {f}/no/a.txt: there is no file {f}/no/a.txt (nor a folder {f}/no)"]),
        ("empty.txt", ["--data {f}/empty.txt: {f}/empty.txt is empty"]),
        (
            "folder",
            ["--data {f}/folder is a folder: give a .txt or .jsonl file, or a .bin/.idx prefix"],
        ),
        ("only", ["--data {f}/only: there is no file {f}/only.bin; beside it: {beside}"]),
        ("only.idx", ["--data {f}/only.idx: there is no file {f}/only.bin; beside it: {beside}"]),
        (
            "lone.bin",
            ["--data {f}/lone.bin: there is no file {f}/lone.idx; beside it: {beside}"],
        ),
        ("void.bin", ["--data {f}/void.bin: {f}/void.bin is empty"]),
        (
            "no.bin",
            [
                "--data {f}/no.bin: there is no file {f}/no.bin; beside it: {beside}",
                "--data {f}/no.bin: there is no file {f}/no.idx; beside it: {beside}",
            ],
        ),
    ],
)
def test_data_files_that_cannot_be_used(tmp_path: Path, data: str, sentences: list[str]) -> None:
    (tmp_path / "folder").mkdir()
    files(tmp_path, a_txt=b"x", a_jsonl=b"x", empty_txt=b"", only_idx=b"x", void_bin=b"")
    files(tmp_path, lone_bin=b"x", other_dat=b"x", void_idx=b"x", zzz_txt=b"x")
    beside = "a.jsonl, a.txt, empty.txt, only.idx"  # four are enough
    want = [sentence.format(f=tmp_path, beside=beside) for sentence in sentences]
    assert violations("--data", f"{tmp_path}/{data}") == want


def test_a_prefix_without_its_index_is_told_which_file_is_missing(tmp_path: Path) -> None:
    files(tmp_path, corpus_bin=b"x")
    (found,) = violations("--data", f"{tmp_path}/corpus")
    assert f"{tmp_path}/corpus.idx" in found


def test_data_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the system's answer is replaced."""
    files(tmp_path, a_txt=b"x", b_txt=b"x")
    refused = tmp_path / "a.txt"
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != refused and may(path, mode))
    assert violations("--data", str(refused)) == [
        f"--data {refused}: {refused} cannot be read (permission denied)"
    ]
    run("--data", str(tmp_path / "b.txt"))


@pytest.mark.parametrize("data", ["a.txt", "a.jsonl", "p", "p.bin", "p.idx", "with.dots"])
def test_data_files_that_can_be_used(tmp_path: Path, data: str) -> None:
    files(tmp_path, a_txt=b"x", a_jsonl=b"x", p_bin=b"x", p_idx=b"x")
    files(tmp_path, with_dots_bin=b"x", with_dots_idx=b"x")
    run("--data", f"{tmp_path}/{data}")


def test_eod_mask_loss_needs_text(tmp_path: Path) -> None:
    files(tmp_path, p_bin=b"x", p_idx=b"x", a_txt=b"x")
    (found,) = violations("--data", f"{tmp_path}/p", "--eod-mask-loss")
    assert found.startswith("--eod-mask-loss needs text")
    run("--data", f"{tmp_path}/a.txt", "--eod-mask-loss")
    run("--eod-mask-loss")
    (found,) = violations("--mock-data", "--eod-mask-loss")
    assert found.startswith("--eod-mask-loss needs text")


def test_a_foreign_dataset_may_have_any_vocabulary(tmp_path: Path) -> None:
    files(tmp_path, p_bin=b"x", p_idx=b"x", a_txt=b"x")
    run("--data", f"{tmp_path}/p", "--vocab-size", "7")
    assert len(violations("--data", f"{tmp_path}/a.txt", "--vocab-size", "7")) == 1


# Optional parts


def test_tensorboard_must_be_installed_if_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        check_module, "find_spec", lambda name: None if name == "tensorboard" else find_spec(name)
    )
    assert violations("--tensorboard") == [
        "--tensorboard: TensorBoard is not installed; pip install tensorboard"
    ]
    run("--no-tensorboard")
    run()


def test_fields_of_a_file_do_not_contradict_flags(tmp_path: Path) -> None:
    """Only flags are compared: a flag may replace what a file says."""
    (tmp_path / "a.toml").write_text('data = "missing.txt"\n')
    config = run("--config", str(tmp_path / "a.toml"), "--mock-data")
    assert config.data.mock_data
