"""What people may well type or have on their disks ends in one sentence that names it before a run
starts, never in a traceback or at the end of the training."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run, violations

from megalite.config_data import DataConfig
from megalite.data.corpus import prepare_corpus
from megalite.data.indexed_reader import IndexedReader
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.mixture import prepare_mixture
from megalite.data.splits import open_samples
from megalite.errors import DataError
from megalite.parallel.groups import ParallelGroups
from megalite.trainer import Trainer

# Numbers


@pytest.mark.parametrize("flag", ["rope-scaling-factor", "adam-eps", "distributed-timeout-minutes"])
def test_infinite_numbers_are_refused(flag: str) -> None:
    """A timeout of infinite minutes fails as a timedelta in every rank."""
    (found,) = violations(f"--{flag}", "inf")
    assert found.startswith(f"--{flag} inf ")


def test_more_heads_than_features_are_blamed_on_the_heads() -> None:
    """The derived head dim is 0: nobody gave that."""
    found = violations("--hidden-size", "128", "--num-attention-heads", "256")
    assert [s for s in found if "--num-attention-heads 256" in s]
    assert not [s for s in found if s.startswith("--head-dim")]


@pytest.mark.parametrize("argv", ["--num-attention-heads 0", "--micro-batch-size 0 --model 125m"])
def test_what_is_derived_from_0_is_not_blamed_too(argv: str) -> None:
    assert violations(*argv.split(), "--global-batch-size", "0") == [
        f"{' '.join(argv.split()[:2])} must be above 0"
    ]


@pytest.mark.parametrize("seed", ["18446744073709551616", "1e20"])
def test_a_seed_of_more_than_64_bits_is_refused(seed: str) -> None:
    """The generator of random tokens takes 64 bits."""
    (found,) = violations("--mock-data", "--seed", seed)
    assert found.startswith("--seed ")


# Data


def test_a_prefix_may_have_a_folder_of_its_name(tmp_path: Path) -> None:
    """Megatron-LM only adds suffixes to it."""
    writer = IndexedWriter(tmp_path / "wiki", np.dtype("<u2"))
    writer.add_sequence(np.arange(9))
    writer.end_document()
    writer.close()
    (tmp_path / "wiki").mkdir()
    config = run("--data", f"{tmp_path}/wiki")
    assert prepare_corpus(config.data).tokens == 9


def test_a_name_that_no_file_can_have() -> None:
    (found,) = violations("--data", "x" * 300)
    assert found.startswith("--data xxx")


def test_random_tokens_are_not_said_to_be_a_file() -> None:
    (found,) = violations("--mock-data", "--eod-mask-loss")
    assert "--mock-data" in found
    assert ".bin" not in found


def test_a_dangling_link_in_the_standard_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Debian's sitecustomize.py is a link into /etc, which a container may lack."""
    root = tmp_path / "lib"
    root.mkdir()
    for i in range(12):
        (root / f"module{i}.py").write_text("value = 1\n" * 10_000)
    (root / "sitecustomize.py").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    corpus = prepare_corpus(DataConfig(data_cache_path=f"{tmp_path}/cache"))
    assert corpus.text_bytes == 12 * 100_000


def test_a_falling_document_array_is_shown(tmp_path: Path) -> None:
    """The rule of `IndexedReader`: the message names what was expected and found."""
    writer = IndexedWriter(tmp_path / "a", np.dtype("<u2"))
    for _ in range(2):
        writer.add_sequence(np.arange(3))
    for _ in range(3):
        writer.end_document()
    writer.close()
    index = tmp_path / "a.idx"
    index.write_bytes(index.read_bytes()[:-32] + np.array([0, 2, 1, 2], "<i8").tobytes())
    with pytest.raises(DataError, match=r"fall.*2\b.*\b1\b"):
        IndexedReader(tmp_path / "a")


def test_a_negative_length_is_shown(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "a", np.dtype("<u2"))
    for _ in range(2):
        writer.add_sequence(np.arange(3))
    writer.end_document()
    writer.close()
    index = tmp_path / "a.idx"
    content = bytearray(index.read_bytes())
    content[38:42] = (-7).to_bytes(4, "little", signed=True)
    index.write_bytes(content)
    with pytest.raises(DataError, match=r"sequence 1.*-7"):
        IndexedReader(tmp_path / "a")


def test_an_empty_validation_share_does_not_end_the_run_in_a_traceback(tmp_path: Path) -> None:
    """`--eval-steps 0` allows a validation share shorter than a sample, as the message about it
    says. The prompt of the closing sample is read from it, after training, before saving."""
    text = tmp_path / "a.txt"
    text.write_text("a line of text, to be read\n" * 400)
    config = run(
        *("--data", str(text), "--data-cache-path", f"{tmp_path}/cache", "--eval-steps", "0"),
        *("--split", "100,0", "--steps", "1", "--micro-batch-size", "1", "--global-batch-size"),
        *("1", "--num-layers", "1", "--hidden-size", "16", "--ffn-hidden-size", "16"),
        *("--seq-length", "32", "--precision", "fp32"),
    )
    samples = open_samples(config, prepare_mixture(config.data))
    trainer = Trainer(config, samples, ParallelGroups.solo(), torch.device("cpu"))
    assert isinstance(trainer.loader.prompt(40), list)
