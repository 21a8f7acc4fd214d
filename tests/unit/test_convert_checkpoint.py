"""tools/convert_checkpoint.py both ways; and what of a foreign folder is refused, by the name of
file and tensor, before anything is read of it."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import load_tool
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalite.checkpoint.hf_folder import HuggingFaceFolder
from megalite.checkpoint.reader import Checkpoint
from megalite.config_model import ModelConfig
from megalite.errors import ConfigError, DamagedError
from megalite.hf_config import to_hf_config
from megalite.tensor_names import tensor_shapes

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=4,
    num_kv_heads=2,
    head_dim=4,
    ffn_hidden_size=24,
    vocab_size=37,
    seq_length=64,
)
SHAPES = tensor_shapes(MODEL)
INDEX = "model.safetensors.index.json"


def random_tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}


def write_config(folder: Path, **changes: Any) -> None:
    folder.mkdir(exist_ok=True)
    content = {**to_hf_config(MODEL, "bfloat16", 1, 2), **changes}
    (folder / "config.json").write_text(json.dumps(content))


def write_model(folder: Path, tensors: dict[str, Tensor] | None = None, files: int = 2) -> Path:
    """A model in several files, as transformers writes it."""
    write_config(folder)
    names = list(tensors or SHAPES)
    tensors = random_tensors() if tensors is None else tensors
    places = {}
    for number in range(files):
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = names[number::files]
        save_file({each: tensors[each] for each in part}, folder / name, {"format": "pt"})
        places |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def convert(source: Path, target: Path, to: str, *more: str) -> None:
    words = ["--input", str(source), "--output", str(target), "--to", to, *more]
    assert load_tool("convert_checkpoint").main(words) == 0


def contents(folder: Path) -> dict[str, Tensor]:
    """By the library's own reader."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ours", "megalite")
    assert "--finetune" in capsys.readouterr().out
    checkpoint = Checkpoint.newest(tmp_path / "ours")
    assert checkpoint.manifest.step == 0
    assert checkpoint.damages() == []
    assert same({name: checkpoint.whole(name) for name in checkpoint.tensors}, random_tensors())
    saved = checkpoint.manifest.facts["config"]
    assert saved["model"]["num_kv_heads"] == 2
    convert(tmp_path / "ours", tmp_path / "back", "hf")
    assert same(contents(tmp_path / "back"), random_tensors())
    old, new = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("hf", "back"))
    tokens = {"bos_token_id", "eos_token_id"}  # no tokenizer is there to say them
    assert {k: v for k, v in old.items() if k not in tokens} == {
        k: v for k, v in new.items() if k not in tokens
    }
    assert not list(tmp_path.glob("*.tmp-*"))


@pytest.mark.parametrize(("dtype", "kept"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_another_precision(tmp_path: Path, dtype: str, kept: torch.dtype) -> None:
    write_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out", "hf", "--dtype", dtype)
    assert same(contents(tmp_path / "out"), {n: v.to(kept) for n, v in random_tensors().items()})


def test_values_that_fp16_has_not(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["model.norm.weight"][3] = 1e5
    write_model(tmp_path / "hf", tensors)
    with pytest.raises(ConfigError, match=r"model\.norm\.weight has values above 65504"):
        convert(tmp_path / "hf", tmp_path / "out", "hf", "--dtype", "fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", None])
def test_files_of_torch(tmp_path: Path, name: str | None) -> None:
    """None: two files and an index."""
    write_config(tmp_path / "hf")
    tensors = random_tensors(torch.float16)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    if name is not None:
        torch.save(tensors, tmp_path / "hf" / name)
    else:
        names, places = list(tensors), {}
        for file, part in (("a.bin", names[::2]), ("b.bin", names[1::2])):
            torch.save({each: tensors[each] for each in part}, tmp_path / "hf" / file)
            places |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": places}
        (tmp_path / "hf/pytorch_model.bin.index.json").write_text(json.dumps(index))
    convert(tmp_path / "hf", tmp_path / "out", "hf")
    assert same(contents(tmp_path / "out"), random_tensors(torch.float16))


class _Planted:
    """What a pickle does that is loaded without care."""

    def __init__(self, path: Path):
        self._path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self._path, "w")


def test_a_planted_pickle_is_never_run(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    folder = tmp_path / "hf"
    write_config(folder)
    torch.save({**random_tensors(), "x": _Planted(trap)}, folder / "pytorch_model.bin")
    with pytest.raises(DamagedError, match=r"pytorch_model\.bin holds more than tensors"):
        convert(folder, tmp_path / "out", "hf")
    assert not trap.exists()
    # Beside safetensors it is not even opened; nor by what a run begins with.
    write_model(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Planted(trap)))
    convert(folder, tmp_path / "out", "hf")
    HuggingFaceFolder.open(folder, SHAPES)
    assert not trap.exists()
    with (folder / "pytorch_model.bin").open("rb") as file:
        pickle.load(file).close()
    assert trap.exists(), "the trap has to be one"


def at(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    """Change the index."""
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


FIRST = "model-00001-of-00002.safetensors"
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def rewrite(folder: Path, **changes: Any) -> None:
    """Tensors of the first file changed, or taken out."""
    tensors = load_file(folder / FIRST)
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, folder / FIRST)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "out of the folder": (
        lambda f: at(f, lambda m: m.update({NORM: "../secret.safetensors"})),
        rf"{INDEX}: {NORM} lies in '../secret.safetensors', which is no plain file name",
    ),
    "absolute": (lambda f: at(f, lambda m: m.update({NORM: "/etc/passwd"})), "no plain file name"),
    "no text": (lambda f: at(f, lambda m: m.update({NORM: 7})), "no plain file name"),
    "another kind of file": (
        lambda f: at(f, lambda m: m.update({NORM: "pytorch_model.bin"})),
        "which is no safetensors file",
    ),
    "twice in the index": (
        lambda f: (f / INDEX).write_text(
            (f / INDEX).read_text().replace('"weight_map": {', f'"weight_map": {{"{NORM}": "x", ')
        ),
        rf"{INDEX} is damaged: it has '{NORM}' twice",
    ),
    "twice in files": (
        lambda f: rewrite(f, **{NORM: torch.zeros(16)}),
        rf"{NORM} is not in .*{INDEX} as a tensor of {FIRST}",
    ),
    "not in its file": (
        lambda f: rewrite(f, **{EMBEDDING: None}),
        rf"{EMBEDDING} is not in .*{FIRST}",
    ),
    "not in the index": (
        lambda f: (rewrite(f, **{EMBEDDING: None}), at(f, lambda m: m.pop(EMBEDDING))),
        rf"has no {EMBEDDING}",
    ),
    "another shape": (
        lambda f: rewrite(f, **{EMBEDDING: torch.zeros(36, 16)}),
        rf"{FIRST}: {EMBEDDING} is of shape \[36, 16\]; config\.json says \[37, 16\]",
    ),
    "whole numbers": (
        lambda f: rewrite(f, **{EMBEDDING: torch.zeros(37, 16, dtype=torch.int32)}),
        rf"{FIRST}: {EMBEDDING} is I32; weights are F32, BF16, F16",
    ),
    "no tensor of a LLaMA": (
        lambda f: (
            rewrite(f, **{"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}),
            at(f, lambda m: m.update({"model.layers.0.self_attn.q_proj.bias": FIRST})),
        ),
        r"q_proj\.bias is no tensor of the model",
    ),
    "cut off": (
        lambda f: (f / FIRST).write_bytes((f / FIRST).read_bytes()[:-5]),
        rf"{FIRST} has \d+ bytes, and its header tells of",
    ),
    "no header": (lambda f: (f / FIRST).write_bytes(b"\xff" * 64), rf"{FIRST} is no safetensors"),
    "a file away": (lambda f: (f / FIRST).unlink(), rf"{FIRST} is not there"),
    "no map": (lambda f: (f / INDEX).write_text("{}"), "has no weight_map"),
    "no JSON": (lambda f: (f / INDEX).write_text("{"), f"{INDEX} is no JSON"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_folders(tmp_path: Path, what: str) -> None:
    spoil, said = HOSTILE[what]
    folder = write_model(tmp_path / "hf")
    HuggingFaceFolder.open(folder, SHAPES)
    spoil(folder)
    with pytest.raises(DamagedError, match=said) as error:
        HuggingFaceFolder.open(folder, SHAPES)
    assert error.value.code == 3


def test_a_folder_without_weights(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin is read by tools/convert_checkpoin"):
        HuggingFaceFolder.open(tmp_path, SHAPES)


def test_a_head_beside_the_embedding_it_is_tied_to(tmp_path: Path) -> None:
    tensors = random_tensors()
    tied = {name: shape for name, shape in SHAPES.items() if name != HEAD}
    write_model(tmp_path / "other", tensors)
    with pytest.raises(DamagedError, match=rf"{HEAD} is not {EMBEDDING}"):
        HuggingFaceFolder.open(tmp_path / "other", tied)
    tensors[HEAD] = tensors[EMBEDDING].clone()
    write_model(tmp_path / "equal", tensors)
    assert HuggingFaceFolder.open(tmp_path / "equal", tied).tensors.keys() == tied.keys()


def test_links_of_a_cache_of_downloads(tmp_path: Path) -> None:
    write_model(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    folder = HuggingFaceFolder.open(tmp_path / "snapshot", SHAPES)
    assert torch.equal(folder.whole(NORM), random_tensors()[NORM])


def test_outputs_and_inputs_that_do_not_fit(tmp_path: Path) -> None:
    write_model(tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"--output .*hf exists; choose another name"):
        convert(tmp_path / "hf", tmp_path / "hf", "hf")
    with pytest.raises(DamagedError, match="holds no checkpoint"):
        convert(tmp_path, tmp_path / "out", "hf")
    convert(tmp_path / "hf", tmp_path / "ours", "megalite")
    (tmp_path / "ours/step-00000000/model.safetensors").write_bytes(b"")
    with pytest.raises(DamagedError):
        convert(tmp_path / "ours", tmp_path / "out", "hf")
    shutil.rmtree(tmp_path / "hf")
    assert not (tmp_path / "out").exists()


def test_a_damaged_byte_is_not_converted(tmp_path: Path) -> None:
    write_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ours", "megalite")
    path = tmp_path / "ours/step-00000000/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedError, match=r"model\.safetensors: bytes \d+ to \d+, of "):
        convert(tmp_path / "ours", tmp_path / "out", "hf")
