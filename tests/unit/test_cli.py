"""The command line merges preset < file < flags, reads back the files it writes, and reports every
problem of a command at once; help needs no torch."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import parse, word_violations

from megalite.config import Config, FieldSpec, fields, resolve, resolve_device
from megalite.config_file import to_toml
from megalite.errors import ConfigError
from megalite.field_values import is_words
from megalite.presets import PRESETS

SPECS = {spec.name: spec for spec in fields()}
BOOLS = [name for name, spec in SPECS.items() if "bool" in str(spec.type)]


def value(config: Config, name: str) -> Any:
    return getattr(getattr(config, SPECS[name].group), name)


def write(path: Path, **values: Any) -> str:
    """A file of the values by field; .json or .toml by the suffix."""
    if path.suffix == ".json":
        path.write_text(json.dumps(values))
    else:
        path.write_text("".join(f"{name} = {json.dumps(v)}\n" for name, v in values.items()))
    return str(path)


# Priority


@pytest.mark.parametrize("suffix", ["toml", "json"])
@pytest.mark.parametrize(
    ("name", "preset", "in_file", "flags", "by_flag"),
    [
        ("num_layers", 12, 5, ["--num-layers", "7"], 7),
        ("num_kv_heads", 12, 6, ["--num-query-groups", "3"], 3),
        ("lr", 6e-4, 1e-3, ["--lr", "2e-3"], 2e-3),
        ("recompute", "none", "full", ["--recompute-activations"], "selective"),
        ("tie_embeddings", False, True, ["--no-tie-embeddings"], False),
        ("sequence_parallel", None, False, ["--sequence-parallel"], True),
        ("pp_layers", (), [9, 3], ["--pp-layers", "4,8"], (4, 8)),
        ("runs", "runs", "elsewhere", ["--runs", "here"], "here"),
    ],
)
def test_flag_beats_file_beats_preset(
    tmp_path: Path,
    suffix: str,
    name: str,
    preset: Any,
    in_file: Any,
    flags: list[str],
    by_flag: Any,
) -> None:
    file = write(tmp_path / f"run.{suffix}", **{name: in_file})
    assert value(parse("--model", "125m").config, name) == preset
    with_file = value(parse("--model", "125m", "--config", file).config, name)
    assert with_file == (tuple(in_file) if isinstance(in_file, list) else in_file)
    for order in (["--config", file, *flags], [*flags, "--config", file]):
        assert value(parse("--model", "125m", *order).config, name) == by_flag


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_changes_its_fields_and_no_others(preset: str) -> None:
    assert parse("--model", preset).config == Config().replace(model=preset, **PRESETS[preset])


def test_a_file_may_choose_the_preset_and_a_flag_another(tmp_path: Path) -> None:
    file = write(tmp_path / "a.toml", model="125m", num_layers=5)
    model = parse("--config", file).config.model
    assert (model.model, model.num_layers, model.hidden_size) == ("125m", 5, 768)
    model = parse("--config", file, "--model", "llama2-7b").config.model
    assert (model.model, model.num_layers, model.hidden_size) == ("llama2-7b", 5, 4096)


@pytest.mark.parametrize("flags", [(), ("--dry-run",), ("--print-config",)])
def test_what_to_do_instead_of_training(flags: tuple[str, ...]) -> None:
    command = parse(*flags)
    assert command.switches == set(flags)


# Values


@pytest.mark.parametrize(
    ("name", "text", "want"),
    [
        ("tokens", "2e9", 2_000_000_000),
        ("tokens", "1.5e3", 1500),
        ("tokens", "1_000_000", 1_000_000),
        ("steps", "32", 32),
        ("steps", "32.0", 32),
        ("tp", "-1", -1),
        ("seed", "9007199254740993", 2**53 + 1),  # not a value of a float
        ("lr", "3e-4", 3e-4),
        ("lr", "1", 1.0),
        ("rope_theta", "500_000", 500_000.0),
        ("pp_layers", "9,7", (9, 7)),
        ("pp_layers", "9, 1e1", (9, 10)),
        ("pp_layers", "8.5,7.50", (8.5, 7.5)),
        ("pp_layers", "4", (4,)),
        ("lr_decay_style", "WSD", "WSD"),
    ],
)
@pytest.mark.parametrize("where", ["flag", "flag=", "toml", "json"])
def test_numbers_as_people_write_them(
    tmp_path: Path, where: str, name: str, text: str, want: Any
) -> None:
    flag = SPECS[name].flag
    argv = {
        "flag": lambda: (flag, text),
        "flag=": lambda: (f"{flag}={text}",),
        "toml": lambda: ("--config", write(tmp_path / "a.toml", **{name: text})),
        "json": lambda: ("--config", write(tmp_path / "a.json", **{name: text})),
    }[where]()
    got = value(parse(*argv).config, name)
    assert got == want
    assert type(got) is type(want)


@pytest.mark.parametrize(
    ("line", "name", "want"),
    [
        ("steps = 1e3", "steps", 1000),
        ("steps = 1_000", "steps", 1000),
        ("lr = 1", "lr", 1.0),
        ("[train]\nlr = 0.5", "lr", 0.5),
        ("num-layers = 3", "num_layers", 3),
        ("pp_layers = [3, 1]", "pp_layers", (3, 1)),
        ("pp_layers = []", "pp_layers", ()),
        ("tie_embeddings = true", "tie_embeddings", True),
        ('tie_embeddings = "true"', "tie_embeddings", True),
        ("tensorboard = false", "tensorboard", False),
    ],
)
def test_values_of_a_toml_file(tmp_path: Path, line: str, name: str, want: Any) -> None:
    (tmp_path / "a.toml").write_text(line)
    got = value(parse("--config", str(tmp_path / "a.toml")).config, name)
    assert got == want
    assert type(got) is type(want)


def test_null_in_json_leaves_a_value_open(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", tensorboard=None, steps=None)
    assert parse("--config", file).config == parse().config


@pytest.mark.parametrize("name", BOOLS)
def test_bool_flags(name: str) -> None:
    flag = SPECS[name].flag
    no = f"--no-{flag[2:]}"
    assert value(parse().config, name) == SPECS[name].default
    assert value(parse(flag).config, name) is True
    assert value(parse(no).config, name) is False
    for argv in ((flag, no), (no, flag)):
        assert word_violations(*argv) == [f"{flag} and {no} contradict: give one"]


@pytest.mark.parametrize(
    ("flag", "text", "expected"),
    [
        *[
            ("--steps", t, "a whole number")
            for t in ("1.5", "x", "", "nan", "inf", "1e999", "true")
        ],
        *[("--lr", t, "a number") for t in ("x", "", "1,5")],
        *[("--pp-layers", t, "a number") for t in ("2,x", "2,,2", "2;2", "nan,2", "2,inf")],
        *[("--rampup-batch-size", t, "a whole number") for t in ("2,x,4", "2,,2", "2.5,2,4")],
        ("--recompute", "some", "one of none, selective, full"),
        ("--device", "gpu", "one of auto, cpu, cuda"),
    ],
)
def test_a_wrong_value_names_the_flag_the_value_and_what_is_expected(
    flag: str, text: str, expected: str
) -> None:
    assert word_violations(f"{flag}={text}") == [f"{flag} {text}: expected {expected}"]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("steps = true", "steps"),
        ("steps = 1.5", "steps"),
        ("steps = nan", "steps"),
        ("steps = inf", "steps"),
        ("steps = [1]", "steps"),
        ("lr = true", "lr"),
        ("lr = [1.0]", "lr"),
        ("tie_embeddings = 1", "tie_embeddings"),
        ('tie_embeddings = "yes"', "tie_embeddings"),
        ("pp_layers = 4", "pp_layers"),
        ("pp_layers = [1, true]", "pp_layers"),
        ("pp_layers = [1.5, nan]", "pp_layers"),
        ("rampup_batch_size = [1.5, 2, 3]", "rampup_batch_size"),
        ("schedule = 1", "schedule"),
        ('recompute = "x"', "recompute"),
        ("name = [1, 2]", "name"),
        ("runs = true", "runs"),
        ("[data.data]\npath = 'x'", "data"),
    ],
)
def test_a_value_of_the_wrong_type_in_a_file_is_reported(
    tmp_path: Path, line: str, name: str
) -> None:
    (tmp_path / "a.toml").write_text(line)
    (found,) = word_violations("--config", str(tmp_path / "a.toml"))
    assert "a.toml" in found
    assert re.search(rf"\b{name} =", found)
    assert "expected" in found


# Unknown flags and presets


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--num-layer 3", "unknown flag --num-layer; did you mean --num-layers?"),
        ("--num_layers 3", "unknown flag --num_layers; did you mean --num-layers?"),
        ("--num-layer=3", "unknown flag --num-layer; did you mean --num-layers?"),
        ("--pp-layer 1 2 3", "unknown flag --pp-layer; did you mean --pp-layers?"),
        (
            "--no-tie-embedding",
            "unknown flag --no-tie-embedding; did you mean --no-tie-embeddings?",
        ),
        ("--dry", "unknown flag --dry; did you mean --dry-run?"),  # no abbreviations
        ("--conf x", "unknown flag --conf; did you mean --config?"),
        ("--train-iter 3", "unknown flag --train-iter; did you mean --train-iters?"),
        ("-tp 2", "unknown flag -tp; did you mean --tp?"),
        ("--qqqqqqqq", "unknown flag --qqqqqqqq; see --help"),
        ("corpus.txt", "'corpus.txt' stands alone: values follow a flag, as in --data corpus.txt"),
        ("--train-data-path --tp 2", "--train-data-path needs a value"),
        ("--dry-run yes", "'yes' stands alone: values follow a flag, as in --data yes"),
        ("--model llama3-8", "--model llama3-8 is not a preset; did you mean llama3-8b?"),
    ],
)
def test_unknown_words(argv: str, sentence: str) -> None:
    assert word_violations(*argv.split()) == [sentence]


def test_a_preset_unlike_any_lists_them_all() -> None:
    (found,) = word_violations("--model", "gpt")
    assert found == "--model gpt is not a preset; there are " + ", ".join(PRESETS)


# All problems at once


def test_all_problems_are_in_one_error(tmp_path: Path) -> None:
    file = write(tmp_path / "a.toml", tp="x", hidden_sise=3, model="tinny", pp_layers=4)
    found = word_violations(
        *("stray", "--config", file, "--bogus", "1", "--steps", "x", "--recompute", "zero"),
        *("--fp8-format", "--normalization", "LayerNorm", "--pp", "2"),
        *("--pipeline-model-parallel-size", "4"),
    )
    parts = [
        "'stray' stands alone",
        "unknown flag --bogus",
        "--fp8-format is not in megalite",
        "--normalization LayerNorm is not in megalite",
        "--pp 2 and --pipeline-model-parallel-size 4 contradict: give one",
        "a.toml: tp = x: expected a whole number",
        "a.toml: no field 'hidden_sise'; did you mean hidden_size?",
        "a.toml: pp_layers = 4: expected numbers separated by commas, as in 8.5,7.5",
        "--steps x: expected a whole number",
        "--recompute zero: expected one of",
        "--model tinny is not a preset; did you mean tiny?",
    ]
    assert len(found) == len(parts), found
    for part in parts:
        assert sum(part in sentence for sentence in found) == 1, (part, found)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ("--bogus 1 --tp", ["--bogus", "--tp"]),
        ("--steps x --tp", ["--steps x", "--tp"]),
        ("--tp --pp", ["--tp", "--pp"]),
        ("--bf16=1 --bogus", ["--bf16", "--bogus"]),
    ],
)
def test_misuse_of_one_flag_does_not_hide_the_other_problems(argv: str, parts: list[str]) -> None:
    text = "\n".join(word_violations(*argv.split()))
    assert [part for part in parts if part not in text] == []


def test_one_problem_is_one_line_and_several_are_a_list() -> None:
    with pytest.raises(ConfigError) as one:
        parse("--steps", "x")
    assert one.value.message() == str(one.value) == "megalite: --steps x: expected a whole number"
    with pytest.raises(ConfigError) as two:
        parse("--steps", "x", "--lr", "y")
    assert two.value.message() == (
        "megalite: 2 problems:\n"
        "  - --steps x: expected a whole number\n"
        "  - --lr y: expected a number"
    )


# Files


def other_value(spec: FieldSpec) -> Any:
    """A value that is not the default."""
    if "bool" in str(spec.type):
        return not spec.default
    if spec.choices:
        return next(c for c in reversed(spec.choices) if c != spec.default)
    if spec.type is int:
        return spec.default + 3
    if spec.type is float:
        return spec.default / 3 + 0.1
    return (
        "125m"
        if spec.name == "model"
        else "x y"
        if spec.type is str
        else ("a b", "0.5")
        if is_words(spec)
        else (2, 1)
    )


OTHERS = {spec.name: other_value(spec) for spec in SPECS.values()}
CONFIGS: dict[str, Callable[[], Config]] = {
    **{name: lambda name=name: parse("--model", name).config for name in PRESETS},
    "resolved": lambda: resolve(parse("--model", "llama3-8b", "--tp", "4").config),
    "every field changed": lambda: Config().replace(**OTHERS),
    "switched off": lambda: Config().replace(**dict.fromkeys(BOOLS, False)),
    "extreme floats": lambda: Config().replace(lr=5e-324, rope_theta=1e22, adam_eps=1 / 3),
    **{
        f"text {text!r}": lambda text=text: Config().replace(data=(text, "b"), runs=text)
        for text in (
            *("a b", "with \"quotes\" and 'these'", "C:\\new\\table", "tab\tline\nend", "#=[x]"),
            *("Ünïcode-中文", "emoji-😀", "delete-\x7f", "bell-\x07"),
        )
    },
}


def test_the_changed_configuration_changes_everything() -> None:
    assert [name for name, spec in SPECS.items() if OTHERS[name] == spec.default] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_toml_round_trip(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]()
    (tmp_path / "a.toml").write_text(to_toml(config), encoding="utf-8")
    assert parse("--config", str(tmp_path / "a.toml")).config == config.given()


@pytest.mark.parametrize("name", CONFIGS)
def test_json_round_trip(tmp_path: Path, name: str) -> None:
    """A run's own config.json."""
    config = CONFIGS[name]()
    (tmp_path / "config.json").write_text(json.dumps(config.to_saved()), encoding="utf-8")
    assert parse("--config", str(tmp_path / "config.json")).config == config.given()


@pytest.mark.parametrize("suffix", ["toml", "json"])
@pytest.mark.parametrize(
    ("first", "again", "want"),
    [
        ("", "--steps 500", dict(lr_decay_steps=500, lr_warmup_steps=50)),
        ("--tokens 409600", "--steps 500", dict(tokens=0, steps=500, lr_decay_steps=500)),
        ("--tokens 409600", "--tokens 819200", dict(steps=200, lr_decay_steps=200)),
        ("--lr-decay-steps 90", "--steps 500", dict(lr_decay_steps=90, lr_warmup_steps=9)),
        ("--lr-warmup-steps 7", "--steps 500", dict(lr_decay_steps=500, lr_warmup_steps=7)),
        ("", "--num-attention-heads 8", dict(num_kv_heads=8, head_dim=16)),
        ("--num-kv-heads 2", "--num-attention-heads 8", dict(num_kv_heads=2, head_dim=16)),
        ("", "--tp 2", dict(sequence_parallel=True)),
        ("", "", dict(device="auto", precision="auto", dp=1)),
        ("--device cpu --precision bf16", "", dict(device="cpu", precision="bf16")),
    ],
)
def test_what_followed_from_others_follows_anew_when_a_saved_file_is_read(
    tmp_path: Path, suffix: str, first: str, again: str, want: dict[str, Any]
) -> None:
    ran = resolve_device(resolve(parse(*first.split()).config), "cpu")
    file = tmp_path / f"saved.{suffix}"
    file.write_text(to_toml(ran) if suffix == "toml" else json.dumps(ran.to_saved()))
    config = resolve(parse("--config", str(file), *again.split()).config)
    assert {name: value(config, name) for name in want} == want


def test_a_saved_run_of_one_model_under_another_name_is_refused(tmp_path: Path) -> None:
    """Its sizes would stay those of the first."""
    file = tmp_path / "saved.toml"
    file.write_text(to_toml(resolve(parse().config)))
    (found,) = word_violations("--config", str(file), "--model", "125m")
    assert found.startswith(f"--model 125m: {file} holds every value of a run of tiny")
    assert parse("--config", str(file), "--model", "tiny").config == parse().config


def test_a_file_must_not_contradict_itself(tmp_path: Path) -> None:
    file = write(tmp_path / "a.toml", steps=3, tokens=100, data="x.txt", mock_data=True)
    assert word_violations("--config", file) == [
        f"--config {file}: steps and tokens contradict: give one",
        f"--config {file}: data and mock_data contradict: give one",
    ]


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.toml", None, "cannot be read: No such file or directory"),
        ("folder", "folder", "cannot be read: Is a directory"),
        ("a.toml", b"name = '\xff'", "cannot be read: 'utf-8' codec"),
        ("a.toml", b"lr = = 3", "is not valid TOML"),
        ("a.toml", b'{"lr": 3}', "is not valid TOML"),
        ("a", b"lr 3", "is not valid TOML"),
        ("a.json", b"lr = 3", "is not valid JSON"),
        ("a.json", b"", "is not valid JSON"),
        ("a.json", b"[1, 2]", "a.json"),
        ("a.json", b"3", "a.json"),
        ("a.json", b"null", "a.json"),
        ("a.toml", b"learning_rate = 3", "no field 'learning_rate'"),
        ("a.toml", b"[model]\nnum_layer = 3", "no field 'num_layer'; did you mean num_layers?"),
        ("a.json", b'{"train": {"stepps": 3}}', "no field 'stepps'; did you mean steps?"),
        ("a.json", b'{"stepps": null}', "no field 'stepps'; did you mean steps?"),
    ],
)
def test_files_that_cannot_be_used(
    tmp_path: Path, name: str, content: bytes | str | None, part: str
) -> None:
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    found = word_violations("--config", str(path), "--bogus")
    assert len(found) == 2, "the unknown flag is reported too"
    assert found[0] == "unknown flag --bogus; see --help"
    assert found[1].startswith(f"--config {path}")
    assert part in found[1]


# Help


def squeezed(text: str) -> str:
    """Without white space, as lines may be broken anywhere."""
    return re.sub(r"\s", "", text)


def test_help_names_every_flag_with_its_line_and_exits_0(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    flags = [spec.flag for spec in SPECS.values()] + ["--config", "--dry-run", "--print-config"]
    flags += [f"--no-{SPECS[name].flag[2:]}" for name in BOOLS]
    assert [f for f in flags if not re.search(rf"(?<![\w-]){f}(?![\w-])", text)] == []
    whole = squeezed(text)
    assert [spec.flag for spec in SPECS.values() if squeezed(spec.doc) not in whole] == []
    assert [preset for preset in PRESETS if preset not in whole] == []
    for flag, default in (
        *(
            ("lr", "0.004"),
            ("micro-batch-size", "8"),
            ("norm-epsilon", "1e-05"),
            ("schedule", "1f1b"),
            ("seed", "1234"),
        ),
        *(("tie-embeddings", "off"), ("save-weights", "on"), ("hidden-dropout", "0")),
    ):
        doc = SPECS[flag.replace("-", "_")].doc
        assert squeezed(f"{doc} (default: {default})") in whole, flag


def test_help_and_errors_need_no_torch() -> None:
    code = """
import sys
from megalite import pretrain
assert pretrain.main(["--bogus", "--tp", "x"]) == 2
assert pretrain.main(["--dry-run", "--steps", "3"]) == 0
try:
    pretrain.main(["--help"])
except SystemExit as stopped:
    sys.exit(10 if stopped.code else 20 if "torch" in sys.modules else 0)
sys.exit(30)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "--num-attention-heads" in result.stdout
    assert "2 problems" in result.stderr


@pytest.mark.parametrize("program", [["megalite.pretrain", "--dry-run"], ["megalite.plan"]])
def test_a_reader_who_has_read_enough_is_no_error(program: list[str]) -> None:
    """`| head`."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", *program],
        check=False,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
