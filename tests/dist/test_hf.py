"""Hugging Face models in and out of running layouts: transformers' logits, and every bit of every
tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_jobs
import pytest
import torch
from pool import RankPool
from runs import read_weights, run_in_pool, worst
from safetensors import safe_open
from torch import Tensor

from megalite import pretrain

transformers = pytest.importorskip("transformers")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS: dict[str, dict[str, Any]] = {
    "grouped": dict(num_key_value_heads=2, rope_parameters=LLAMA3),
    "tied": dict(num_key_value_heads=4, tie_word_embeddings=True, head_dim=12),
    "linear": dict(
        num_key_value_heads=1,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    ),
    "yarn": dict(
        num_key_value_heads=2,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": dict(tp=2),
    "pp2": dict(pp=2),
    "dp2-zero3": dict(dp=2, zero=3),
    "tp2-pp2": dict(tp=2, pp=2),
    "dp4-zero2-groups": dict(dp=4, zero=2, zero_shard_size=2),
}
CASES = [(model, layout) for model in MODELS for layout in LAYOUTS]
PLAIN = [("grouped", "tp2-pp2"), ("tied", "pp2"), ("tied", "dp2-zero3"), ("linear", "tp2")]


def size(layout: str) -> int:
    """Ranks of a layout."""
    values = LAYOUTS[layout]
    return values.get("tp", 1) * values.get("pp", 1) * values.get("dp", 1)


def write_model(folder: Path, dtype: torch.dtype, **values: Any) -> Any:
    """A random model of transformers, in several files."""
    torch.manual_seed(11)
    if int(transformers.__version__.split(".")[0]) < 5 and "rope_parameters" in values:
        scaling = dict(values.pop("rope_parameters"))
        values |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    config = transformers.LlamaConfig(
        vocab_size=261,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        attn_implementation="eager",
        **values,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:  # ones would hide a norm weight that is not applied
                weight.uniform_(0.5, 1.5)
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return model


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, by its own reader."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                assert name not in found
                found[name] = file.get_tensor(name)
    return found


def next_logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([hf_jobs.PROMPT])).logits[0, -1]


def check(pool: RankPool, tmp_path: Path, model: str, layout: str) -> None:
    theirs = write_model(tmp_path / "in", torch.float32, **MODELS[model])
    ranks, values = size(layout), LAYOUTS[layout]
    job = hf_jobs.into_and_out
    outcomes = pool.run(ranks, job, tmp_path / "in", tmp_path / "out", ("fp32", "bf16"), values)
    ours = [outcome.value for outcome in outcomes if outcome.value is not None]
    want = next_logits(theirs)
    assert want.abs().max() > 1.0, "the comparison must not be between two zeros"
    assert ours
    assert all((logits - want).abs().max() <= 1e-5 for logits in ours)
    before = tensors(tmp_path / "in")
    after = tensors(tmp_path / "out/fp32")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    halves = tensors(tmp_path / "out/bf16")
    assert all(torch.equal(before[name].bfloat16(), halves[name]) for name in before)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out/fp32", attn_implementation="eager"
    )
    assert again.dtype == torch.float32
    assert torch.equal(next_logits(again), want)
    # Out and in again, in another layout, from 16 bits into master weights and back.
    outcomes = pool.run(
        2, job, tmp_path / "out/bf16", tmp_path / "back", ("bf16",), dict(tp=2, precision="bf16")
    )
    back = tensors(tmp_path / "back/bf16")
    assert all(torch.equal(halves[name], back[name]) for name in halves)


@pytest.mark.parametrize(("model", "layout"), PLAIN)
def test_in_and_out(pool: RankPool, tmp_path: Path, model: str, layout: str) -> None:
    check(pool, tmp_path, model, layout)


@pytest.mark.full
@pytest.mark.parametrize(("model", "layout"), [case for case in CASES if case not in PLAIN])
def test_in_and_out_of_every_layout(
    pool: RankPool, tmp_path: Path, model: str, layout: str
) -> None:
    check(pool, tmp_path, model, layout)


def test_master_weights_are_exported(pool: RankPool, tmp_path: Path) -> None:
    """After a step in bf16 the fp32 file has digits that the bf16 one has not, and rounds to it."""
    write_model(tmp_path / "in", torch.bfloat16, **MODELS["tied"])
    values = dict(pp=2, precision="bf16", lr=1e-3, freeze=("model.norm.weight",))
    for dtype in ("fp32", "auto"):
        told = pool.run(
            2,
            hf_jobs.export_trained,
            tmp_path / "in",
            tmp_path / dtype,
            {**values, "export_dtype": dtype},
        )[0].value
        assert told.startswith(f"exported to {tmp_path / dtype}")
        assert "transformers has no equal of ByteTokenizer" in told
    before, full, halves = (tensors(tmp_path / name) for name in ("in", "fp32", "auto"))
    assert before.keys() == full.keys() == halves.keys()
    for name, value in full.items():
        assert value.dtype == torch.float32
        assert halves[name].dtype == torch.bfloat16
        assert torch.equal(value.bfloat16(), halves[name])
        moved = name != "model.norm.weight"
        assert torch.equal(value, before[name].float()) != moved
        assert (value - before[name].float()).abs().max() < 5 * values["lr"]  # not anything else's
    config = json.loads((tmp_path / "auto/config.json").read_text())
    assert (config["dtype"], config["eos_token_id"]) == ("bfloat16", 256)


RUN = (
    "--tokenizer-type ByteTokenizer --seq-length 32 --global-batch-size 8 --micro-batch-size 2 "
    "--steps 2 --lr 1e-3 --sample-length 0 --eval-steps 0"
).split()


def test_a_run_in_and_out(pool: RankPool, tmp_path: Path) -> None:
    write_model(tmp_path / "in", torch.float32, **MODELS["tied"])
    flags = ["--init-from", str(tmp_path / "in"), "--export-hf", str(tmp_path / "out"), *RUN]
    run = run_in_pool(pool, [*flags, "--tp", "2"], 2, tmp_path / "runs")
    assert f"exported to {tmp_path / 'out'}, a Hugging Face model" in run.stdout
    before, exported = tensors(tmp_path / "in"), tensors(tmp_path / "out")
    assert before.keys() == exported.keys() == run.weights.keys()
    # Two steps from what was imported, not from initial weights of its own.
    assert all((exported[name] - before[name]).abs().max() < 1e-2 for name in before)
    assert all(torch.equal(exported[name], run.weights[name]) for name in exported)
    assert not list(tmp_path.glob("*.tmp-*"))
    flags[3] = str(tmp_path / "again")
    alone = run_in_pool(pool, flags, 1, tmp_path / "runs")
    assert worst(run.losses, alone.losses) < 1e-5
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not list(set(theirs.state_dict()) ^ {*exported, "lm_head.weight"})


def test_a_damaged_model_ends_a_run_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "in", torch.float32)
    path = sorted((tmp_path / "in").glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1])
    code = pretrain.main(["--init-from", str(tmp_path / "in"), "--device", "cpu", *RUN])
    assert code == 3
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "megalite" in line]
    assert line.startswith(f"megalite: {path} has ")


def test_a_run_that_goes_on_reads_its_checkpoint(pool: RankPool, tmp_path: Path) -> None:
    """Not the model that it once began with, whose files may have gone by then."""
    write_model(tmp_path / "in", torch.float32)
    flags = ["--init-from", str(tmp_path / "in"), "--save", str(tmp_path / "saved"), *RUN]
    flags += ["--runs", str(tmp_path / "runs"), "--device", "cpu"]
    assert pool.run(1, pretrain.main, [*flags, "--name", "a"])[0].value == 0
    for path in (tmp_path / "in").glob("*.safetensors"):
        path.unlink()
    flags += ["--export-hf", str(tmp_path / "out"), "--export-dtype", "bf16"]
    assert pool.run(1, pretrain.main, [*flags, "--name", "b"])[0].value == 0
    saved, exported = read_weights(tmp_path / "saved"), tensors(tmp_path / "out")
    assert saved.keys() == exported.keys()
    assert all(torch.equal(saved[name].bfloat16(), exported[name]) for name in saved)
