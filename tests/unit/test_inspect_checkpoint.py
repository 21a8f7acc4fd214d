"""tools/inspect_checkpoint.py: what it says is there, is damaged, or differs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from runs import SMALL, load_tool

from megalite import pretrain
from megalite.checkpoint.directory import Directory
from megalite.checkpoint.parts import Part
from megalite.checkpoint.regions import whole
from megalite.checkpoint.saver import Saver
from megalite.errors import ConfigError, DamagedError

TOOL = load_tool("inspect_checkpoint")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    argv = [*SMALL, "--steps", "4", "--save", str(folder / "ck"), "--save-interval", "2"]
    assert pretrain.main([*argv, "--runs", str(folder), "--mock-data", "--device", "cpu"]) == 0
    return folder / "ck"


def said(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    capsys.readouterr()
    assert TOOL.main([str(word) for word in words]) == code
    return capsys.readouterr().out


def test_what_is_there(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "--input", saved)
    for words in ("step 4: manifest", "step 2: manifest", "step      4, 32 samples, 1024 tokens"):
        assert words in text
    assert "weights, F32: " in text and "num_layers 4" in text
    tensors = said(capsys, "--input", saved / "step-00000002", "--tensors")
    assert "step      2" in tensors
    assert "model.norm.weight  F32 [32]  rank-00000.safetensors" in tensors
    layout = said(capsys, "--input", saved, "--tp", "2", "--pp", "2")
    assert "layer 3, head" in layout


def test_every_byte(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "every byte is right" in said(capsys, "--input", saved, "--verify")
    shutil.copytree(saved, tmp_path / "ck")
    path = tmp_path / "ck/step-00000004/rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=r"rank-00000\.safetensors: bytes .* of optimizer"):
        TOOL.main(["--input", str(tmp_path / "ck"), "--verify"])
    with pytest.raises(ConfigError, match="is no folder"):
        TOOL.main(["--input", str(tmp_path / "nowhere")])
    with pytest.raises(DamagedError, match="holds no checkpoint"):
        TOOL.main(["--input", str(tmp_path)])


def write(folder: Path, step: int, tensors: dict[str, torch.Tensor]) -> Path:
    saver = Saver(folder, 0, 1, dist.HashStore(), torch.device("cpu"), 10.0)
    parts = [Part(n, tuple(x.shape), whole(x.shape), x.reshape(-1)) for n, x in tensors.items()]
    saver.start(step, parts, {"data": "x"}, 0, 0)
    saver.finish(is_last=True)
    return Directory(folder).folder(step)


def test_what_differs(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nan = torch.tensor([1.0, float("nan"), 3.0])
    a = write(tmp_path / "a", 1, {"same": nan, "w": torch.zeros(2, 3), "only": torch.ones(1)})
    changed = torch.zeros(2, 3)
    changed[1, 2] = 0.5
    b = write(tmp_path / "b", 1, {"same": nan, "w": changed, "other": torch.ones(1)})
    text = said(capsys, "--input", a, "--diff", b, code=1)
    assert "w: 1 of 6 elements differ, by 0.5 at most" in text
    assert f"only: only in {a}" in text and f"other: only in {b}" in text
    assert "same" not in text.partition("3 differences")[0].replace("samples", "")
    assert "no difference" in said(capsys, "--input", a, "--diff", a)
