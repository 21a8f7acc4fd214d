"""config.json as transformers reads and writes it, whichever version; what is not LLaMA is refused
by name; what `--model` and `--init-from` make of it on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalite import cli
from megalite.check import check
from megalite.config import Config, resolve
from megalite.errors import ConfigError, DamagedError
from megalite.hf_config import SHAPE, read_hf_config, to_hf_config
from megalite.presets import LARGE_RUN, PRESETS

transformers = pytest.importorskip("transformers")
MAJOR = int(transformers.__version__.split(".")[0])

BASE: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 2048,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


def write(folder: Path, content: dict[str, Any] | str) -> Path:
    folder.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "config.json").write_text(text)
    return folder


def resolved(**values: Any) -> Config:
    return resolve(Config().replace(**values))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_come_back(tmp_path: Path, preset: str) -> None:
    config = resolved(**PRESETS[preset])
    model = config.model
    write(tmp_path, to_hf_config(model, "bfloat16", 1, 2))
    found = read_hf_config(tmp_path)
    assert found == {name: getattr(model, name) for name in found}
    assert set(SHAPE) < found.keys()


@pytest.mark.parametrize(
    "values",
    [
        {},
        dict(rope_scaling="linear", rope_scaling_factor=2.0, tie_embeddings=True, head_dim=24),
        dict(rope_scaling="llama3", rope_scaling_factor=32.0, rope_theta=5e5, num_kv_heads=2),
        dict(
            rope_scaling="yarn",
            rope_scaling_factor=4.0,
            rope_original_seq_length=512,
            rope_yarn_beta_fast=24.0,
            rope_yarn_attention_factor=1.5,
            norm_epsilon=1e-6,
        ),
    ],
)
def test_transformers_reads_what_is_written(tmp_path: Path, values: dict[str, Any]) -> None:
    model = resolved(**values).model
    write(tmp_path, to_hf_config(model, "bfloat16", 1, 2))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "LlamaConfig"
    assert theirs.num_hidden_layers == model.num_layers
    assert theirs.head_dim == model.head_dim
    assert theirs.num_key_value_heads == model.num_kv_heads
    assert theirs.tie_word_embeddings == model.tie_embeddings
    assert theirs.rms_norm_eps == model.norm_epsilon
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    assert str(theirs.dtype if MAJOR >= 5 else theirs.torch_dtype).endswith("bfloat16")
    if MAJOR >= 5:
        rope = dict(theirs.rope_parameters)
    else:
        rope = {
            "rope_theta": theirs.rope_theta,
            **(theirs.rope_scaling or {"rope_type": "default"}),
        }
    kind = "default" if model.rope_scaling == "none" else model.rope_scaling
    assert (rope.pop("rope_type"), rope.pop("rope_theta")) == (kind, model.rope_theta)
    here = {
        "factor": model.rope_scaling_factor,
        "low_freq_factor": model.rope_low_freq_factor,
        "high_freq_factor": model.rope_high_freq_factor,
        "original_max_position_embeddings": model.rope_original_seq_length,
        "beta_fast": model.rope_yarn_beta_fast,
        "beta_slow": model.rope_yarn_beta_slow,
        "attention_factor": model.rope_yarn_attention_factor,
    }
    assert rope == {name: here[name] for name in rope}
    assert bool(rope) == (kind != "default")
    # What it writes is read here: the form of the version that is installed.
    theirs.save_pretrained(tmp_path / "theirs")
    assert read_hf_config(tmp_path / "theirs") == read_hf_config(tmp_path)


@pytest.mark.parametrize("scaling", [LLAMA3, YARN, {"type": "linear", "factor": 2.0}])
def test_both_forms_are_read_alike(tmp_path: Path, scaling: dict[str, Any]) -> None:
    old = {**BASE, "rope_theta": 5e5, "rope_scaling": scaling}
    new = {**BASE, "rope_parameters": {"rope_theta": 5e5, **scaling}}
    both = {**old, **new}
    found = [
        read_hf_config(write(tmp_path / str(n), content))
        for n, content in enumerate((old, new, both))
    ]
    assert found[0] == found[1] == found[2]
    assert found[0]["rope_theta"] == 5e5
    assert found[0]["rope_scaling"] == scaling.get("rope_type", "linear")
    assert found[0]["rope_scaling_factor"] == scaling["factor"]
    assert found[0]["seq_length"] == scaling.get("original_max_position_embeddings", 2048)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "0")
    theirs.save_pretrained(tmp_path / "theirs")
    assert read_hf_config(tmp_path / "theirs") == found[0] | {"norm_epsilon": theirs.rms_norm_eps}


def test_what_is_left_out_is_what_transformers_takes(tmp_path: Path) -> None:
    left_out = {"num_key_value_heads", "architectures", "max_position_embeddings"}
    write(tmp_path, {name: value for name, value in BASE.items() if name not in left_out})
    found = read_hf_config(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert found["num_kv_heads"] == theirs.num_key_value_heads == 4
    assert found["head_dim"] == theirs.head_dim == 16
    assert found["norm_epsilon"] == theirs.rms_norm_eps
    assert found["seq_length"] == theirs.max_position_embeddings
    assert found["tie_embeddings"] == theirs.tie_word_embeddings
    assert found["init_method_std"] == theirs.initializer_range
    assert found["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "qwen2"}, 'model_type "qwen2" is not in megalite'),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"attention_bias": True}, "attention_bias true is not in megalite"),
        ({"mlp_bias": True}, "mlp_bias true"),
        ({"hidden_act": "gelu"}, 'hidden_act "gelu"'),
        ({"sliding_window": 4096}, "sliding_window 4096"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 'rope_type "dynamic"'),
        ({"rope_scaling": {**YARN, "mscale": 0.7}}, "mscale 0.7 of rope_type yarn"),
        ({"rope_scaling": {**YARN, "truncate": False}}, "truncate false"),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_theta is 10000.0 in rope_theta and 500000.0 in rope_parameters",
        ),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}},
            'rope_type is "llama3" in rope_scaling and "default" in rope_parameters',
        ),
    ],
)
def test_what_is_refused_by_name(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    write(tmp_path, {**BASE, **change})
    with pytest.raises(ConfigError) as error:
        read_hf_config(tmp_path)
    assert error.value.code == 2
    assert named in error.value.violations[0]
    assert str(tmp_path / "config.json") in error.value.violations[0]


def test_all_that_is_refused_is_told_at_once(tmp_path: Path) -> None:
    write(tmp_path, {**BASE, "mlp_bias": True, "hidden_act": "relu"})
    with pytest.raises(ConfigError) as error:
        read_hf_config(tmp_path)
    assert len(error.value.violations) == 2


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "is no JSON"),
        ("[" * 100000, "is no JSON"),
        ("[1]", "holds no names and values"),
        ('{"model_type": "llama", "model_type": "llama"}', "has 'model_type' twice"),
        ("{}", "has no model_type"),
        ({"model_type": "llama"}, "has no num_attention_heads"),
        ({**BASE, "hidden_size": -1}, "hidden_size -1 is no whole number from 1"),
        ({**BASE, "hidden_size": "64"}, 'hidden_size "64"'),
        ({**BASE, "num_hidden_layers": 1 << 30}, "no whole number from 1 to 10000"),
        ({**BASE, "num_hidden_layers": True}, "num_hidden_layers true"),
        ({**BASE, "vocab_size": 1 << 50}, "vocab_size"),
        ({**BASE, "rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({**BASE, "tie_word_embeddings": 1}, "tie_word_embeddings 1 is not true or false"),
        ({**BASE, "rope_scaling": "yarn"}, "rope_scaling"),
        ({**BASE, "rope_scaling": {"rope_type": "linear"}}, "has no factor"),
    ],
)
def test_damaged_files(tmp_path: Path, content: dict[str, Any] | str, named: str) -> None:
    write(tmp_path, content)
    with pytest.raises(DamagedError) as error:
        read_hf_config(tmp_path)
    assert error.value.code == 3
    assert named in error.value.violations[0]
    assert str(tmp_path / "config.json") in error.value.violations[0]


def parse(*words: str) -> cli.Command:
    return cli.parse(words, prog="p", description="d", switches={})


@pytest.mark.parametrize("flag", ["--model", "--init-from"])
def test_a_folder_sets_the_model(tmp_path: Path, flag: str) -> None:
    write(tmp_path, {**BASE, "rope_theta": 5e5})
    command = parse(flag, str(tmp_path), "--seq-length", "256")
    assert not command.problems
    expected = {**LARGE_RUN, **read_hf_config(tmp_path), "model": str(tmp_path), "seq_length": 256}
    if flag == "--init-from":
        expected["init_from"] = str(tmp_path)
    assert command.config == Config().replace(**expected)


def test_a_preset_says_how_an_imported_model_is_trained(tmp_path: Path) -> None:
    write(tmp_path, BASE)
    config = parse("--init-from", str(tmp_path), "--model", "125m").config
    assert config.train.lr == PRESETS["125m"]["lr"] != LARGE_RUN["lr"]
    assert config.model.num_layers == 3


def test_shapes_that_contradict_the_file(tmp_path: Path) -> None:
    write(tmp_path, BASE)
    values = tmp_path / "values.toml"
    values.write_text("vocab_size = 128\nseq_length = 64\n")
    words = ["--init-from", str(tmp_path), "--num-layers", "4", "--hidden-size", "64"]
    command = parse(*words, "--config", str(values))
    layers, vocabulary = command.problems
    assert layers.startswith(f"--num-layers 4 and --init-from {tmp_path} contradict")
    assert "its config.json says 3" in layers
    assert vocabulary.startswith(f"vocab_size = 128 and --init-from {tmp_path} contradict")
    assert command.config.model.seq_length == 64


def test_a_saved_run_keeps_what_it_imported(tmp_path: Path) -> None:
    """Its file holds every value: neither the folder nor its length come before them again."""
    model = write(tmp_path / "model", BASE)
    first = parse("--init-from", str(model), "--seq-length", "64", "--steps", "9").config
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps(resolve(first).to_saved()))
    again = parse("--config", str(saved))
    assert not again.problems
    assert resolve(again.config) == resolve(first)
    # Another model is begun with: its positions are those of its own file.
    other = write(tmp_path / "other", {**BASE, "rope_theta": 5e5})
    changed = parse("--config", str(saved), "--init-from", str(other))
    assert not changed.problems
    assert changed.config.model.rope_theta == 5e5


def test_what_is_wrong_is_told_with_the_flag(tmp_path: Path) -> None:
    (only,) = parse("--init-from", str(tmp_path / "nosuch"), "--num-layers", "4").problems
    assert only.startswith(f"--init-from {tmp_path / 'nosuch'}: ")
    assert "nosuch has no config.json: give the folder of a Hugging Face model" in only
    write(tmp_path, {**BASE, "mlp_bias": True})
    (only,) = parse("--model", str(tmp_path)).problems
    assert only.startswith(f"--model {tmp_path}: ")


def problems(*words: str) -> list[str]:
    command = parse(*words)
    with pytest.raises(ConfigError) as error:
        check(resolve(command.config), None, command.problems, command.unread, command.given)
    return error.value.violations


def test_a_model_comes_with_its_tokenizer(tmp_path: Path) -> None:
    write(tmp_path, {**BASE, "vocab_size": 300})
    (tmp_path / "tokenizer.model").write_bytes(b"not looked into")
    (only,) = problems("--init-from", str(tmp_path))
    assert only == (
        f"--init-from {tmp_path} has a tokenizer of its own: give --tokenizer-type Llama2Tokenizer "
        f"--tokenizer-model {tmp_path}/tokenizer.model"
    )
    for words in (["--mock-data"], ["--tokenizer-type", "ByteTokenizer"]):
        command = parse("--init-from", str(tmp_path), *words)
        check(resolve(command.config), None, command.problems, command.unread, command.given)


def test_the_vocabulary_holds_the_tokenizer(tmp_path: Path) -> None:
    write(tmp_path, BASE)
    (only,) = problems("--init-from", str(tmp_path), "--tokenizer-type", "ByteTokenizer")
    assert only == "--vocab-size 101 is below the 257 tokens of ByteTokenizer"


def test_an_export_is_a_new_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    (only,) = problems("--export-hf", str(tmp_path))
    assert only == f"--export-hf {tmp_path} exists; choose another name or remove it"
    (only,) = problems("--export-hf", str(tmp_path / "a/b"))
    assert only == f"--export-hf {tmp_path}/a/b: {tmp_path}/a can't be written to; " + (
        "choose another folder"
    )
    (only,) = problems("--export-dtype", "fp16")
    assert only == "--export-dtype fp16 has no effect without --export-hf; leave it out"
    check(resolve(parse("--export-hf", str(tmp_path / "b/c")).config))
