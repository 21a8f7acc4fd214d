"""Which back end serves a call, and what is said when none can."""

from __future__ import annotations

import inspect
import threading
from types import SimpleNamespace

import pytest
import torch

import megalite_kernels
from megalite_kernels import OPERATIONS, BackendError, back_ends, backend, use_backend

ON_GPU = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, get_device=lambda: 0)
ON_CPU = torch.ones(2)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    monkeypatch.delenv(backend.VARIABLE, raising=False)


@pytest.fixture
def usable(monkeypatch):
    """What `triton_trouble` finds; None: nothing."""

    def say(reason: str | None) -> None:
        backend.require_triton.cache_clear()
        monkeypatch.setattr(backend, "triton_trouble", lambda index: reason)

    yield say
    backend.require_triton.cache_clear()


def test_auto_decides_by_the_tensor(usable) -> None:
    usable(None)
    assert backend.runs_fused(ON_GPU)
    assert not backend.runs_fused(ON_CPU)
    assert not backend.runs_fused(SimpleNamespace(is_cuda=True, dtype=torch.float64))


def test_a_gpu_without_triton_is_told_the_remedy(usable) -> None:
    usable("megalite's kernels on a GPU need triton, which is not installed: pip install triton")
    with pytest.raises(BackendError, match=r"pip install triton, or set MEGALITE_KERNELS=torch"):
        backend.runs_fused(ON_GPU)
    with use_backend("torch"):
        assert not backend.runs_fused(ON_GPU)


def test_what_keeps_triton_from_a_card(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla P40")
    found = backend.triton_trouble(0)
    assert found == "triton needs compute capability 7.0, and Tesla P40 has 6.1: use a newer card"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert backend.triton_trouble(0) is None
    monkeypatch.setattr(backend, "_has_triton", lambda: False)
    assert "pip install triton" in backend.triton_trouble(0)


def test_the_variable_and_the_context(monkeypatch, usable) -> None:
    usable(None)
    monkeypatch.setenv(backend.VARIABLE, "torch")
    assert not backend.runs_fused(ON_GPU)
    with use_backend("auto"):
        assert backend.runs_fused(ON_GPU)
        with use_backend("triton"):
            assert backend.runs_fused(ON_CPU), "the interpreter serves the CPU here"
        assert not backend.runs_fused(ON_CPU)
    assert not backend.runs_fused(ON_GPU)


def test_other_words_are_refused(monkeypatch) -> None:
    with (
        pytest.raises(ValueError, match="use_backend: 'cuda' is not a back end; choose one of"),
        use_backend("cuda"),
    ):
        pass
    monkeypatch.setenv(backend.VARIABLE, "Triton")
    with pytest.raises(ValueError, match="MEGALITE_KERNELS: 'Triton' is not a back end"):
        backend.runs_fused(ON_CPU)


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch) -> None:
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    with use_backend("triton"), pytest.raises(BackendError, match="TRITON_INTERPRET=1"):
        backend.runs_fused(ON_CPU)


def test_a_choice_is_its_thread_s_own() -> None:
    seen = []
    with use_backend("triton"):
        thread = threading.Thread(target=lambda: seen.append(backend.runs_fused(ON_CPU)))
        thread.start()
        thread.join()
    assert seen == [False]


def test_names_for_the_opening_lines() -> None:
    import triton

    cpu = torch.device("cpu")
    assert back_ends(cpu, torch.float32) == dict.fromkeys(OPERATIONS, "torch")
    with use_backend("triton"):
        served = back_ends(cpu, torch.float32)
    assert set(served.values()) == {f"triton {triton.__version__}"}


def test_both_back_ends_are_called_alike() -> None:
    """Every operation's definition takes what its page takes, so that no argument is lost."""
    for name in megalite_kernels.__all__:
        if name in ("OPERATIONS", "BackendError", "back_ends", "use_backend"):
            continue
        page = inspect.signature(getattr(megalite_kernels, name)).parameters
        assert page, name
        homes = (megalite_kernels.reference, megalite_kernels.reference_cross_entropy)
        definition = next((getattr(h, name) for h in homes if hasattr(h, name)), None)
        if definition is None:
            assert name == "linear_cross_entropy"
            continue
        names = [p for p in page if p != "inplace"]
        assert list(inspect.signature(definition).parameters) == names, name
