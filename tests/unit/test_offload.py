"""Optimizer states in the host's memory: what is told of them, and what happens to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import run, violations

from megalite.check_memory import host_memory
from megalite.effects import notes
from megalite.errors import ConfigError
from megalite.estimate import rank_estimates
from megalite.optim.offload import HostMemory, Offloaded
from megalite.parallel import machine

CPU = torch.device("cpu")
LARGE = "--model llama3-8b --offload-optimizer --precision bf16 --dp 4"


def test_each_state_visits_in_turn_and_what_it_is_then_comes_back() -> None:
    sizes = (5, 0, 9, 3)
    homes = [(torch.full((n,), float(n)), torch.arange(n)) for n in sizes]
    offloaded = Offloaded(homes, CPU)
    seen = []
    for number, (a, b) in enumerate(offloaded.visit(homes)):
        seen.append((a.tolist(), b.tolist()))
        assert a.untyped_storage().nbytes() == 4 * max(sizes), "buffers that stay"
        a += 100 * number
        b *= 2
    assert seen == [([float(n)] * n, list(range(n))) for n in sizes]
    offloaded.settle()
    for number, (n, (a, b)) in enumerate(zip(sizes, homes, strict=True)):
        assert a.tolist() == [n + 100.0 * number] * n
        assert b.tolist() == [2 * i for i in range(n)]


def test_nothing_to_visit() -> None:
    assert list(Offloaded([(torch.ones(2),)], CPU).visit([])) == []


def test_memory_that_cannot_be_pinned_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory\nmore")

    monkeypatch.setattr(torch, "empty", refused)
    with pytest.raises(ConfigError) as caught:
        HostMemory(3 * 2**28, torch.float32, torch.device("cuda"))
    (told,) = caught.value.violations
    assert told.startswith("--offload-optimizer: 3.0 GiB more of the host's memory can't be pinned")
    assert "out of memory)" in told


def test_the_estimate_moves_states_to_the_host() -> None:
    (away,), (here,) = (
        rank_estimates(run(*words.split()))
        for words in (LARGE, LARGE.replace("--offload-optimizer", ""))
    )
    # Of 7.5 GiB each, as pinned memory comes in powers of two.
    assert here.optimizer / 3 == pytest.approx(7.48 * 2**30, rel=1e-3)
    assert away.host == 3 * 8 * 2**30 and here.host == 0
    # Two visitors of the largest bucket, the embedding's: 12 bytes of each element over 4 ranks.
    assert away.optimizer == pytest.approx(2 * 12 * 128256 * 4096 / 4, rel=1e-3)


@pytest.mark.parametrize(("free", "told"), [(50, True), (100, False), (None, False)])
def test_more_than_the_host_has_is_refused(free: int | None, told: bool) -> None:
    """Four ranks with 24 GiB each."""
    have = None if free is None else free * 2**30
    found = list(host_memory(run(*LARGE.split(), "--device", "cuda"), 4, have))
    want = (
        "--offload-optimizer: 4 ranks on this machine would pin 96.0 GiB of its memory, of which "
        "50.0 GiB are free; give more --dp over more machines, or leave it out"
    )
    assert found == ([want] if told else [])


def test_linux_says_what_is_free() -> None:
    free = machine.free_host_bytes()
    assert Path("/proc/meminfo").exists() == (free is not None)
    assert free is None or 2**20 < free < 2**50


def test_what_it_does_not_go_with_and_where_it_has_no_use() -> None:
    (told,) = violations(*"--pp 2 --post-validation --offload-optimizer".split())
    assert told.startswith("--post-validation and --offload-optimizer: a guessed step keeps")
    on_cpu = run("--offload-optimizer", "--device", "cpu")
    assert any("has no use on a CPU" in note for note in notes(on_cpu, {}))
    assert not notes(run("--offload-optimizer", "--device", "cuda"), {})
