"""Which back end serves a call, and what is said when none can."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from interpreted import interpreted
from torch.utils.checkpoint import checkpoint

import megalite_kernels
from megalite.parallel.environment import KERNEL_BACK_ENDS
from megalite_kernels import OPERATIONS, BackendError, back_ends, backend, use_backend

ON_GPU = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
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
    assert not backend.runs_fused(SimpleNamespace(device=ON_GPU.device, dtype=torch.float64))


def test_a_gpu_without_triton_is_told_the_remedy(usable) -> None:
    usable("what is wrong, and what helps")
    with pytest.raises(BackendError, match="what is wrong, and what helps"):
        backend.runs_fused(ON_GPU)
    with use_backend("torch"):
        assert not backend.runs_fused(ON_GPU)


@pytest.fixture
def triton_3_6(monkeypatch):
    monkeypatch.setattr(backend, "INSTALLED", True)
    monkeypatch.setattr(backend, "_triton_version", lambda: "3.6.0")


def test_what_keeps_triton_from_a_card(monkeypatch, triton_3_6) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla P40")
    found = backend.triton_trouble(0)
    assert found == (
        "triton needs compute capability 7.0, and Tesla P40 has 6.1: use a newer card, or set "
        "MEGALITE_KERNELS=torch to run plain torch (slower)"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert backend.triton_trouble(0) is None
    monkeypatch.setattr(backend, "INSTALLED", False)
    assert "pip install triton, or set MEGALITE_KERNELS=torch" in backend.triton_trouble(0)


@pytest.mark.parametrize(
    ("version", "serves"),
    [("2.3.1", False), ("3.3.1", False), ("3.4.0", True), ("3.10.0+git1", True), ("4.0", True)],
)
def test_an_older_triton_is_named(monkeypatch, triton_3_6, version: str, serves: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(backend, "_triton_version", lambda: version)
    found = backend.triton_trouble(0)
    assert (found is None) is serves
    assert serves or f"need triton 3.4, and {version} is installed: pip install" in found


def test_torch_for_amd_is_told_the_remedy(monkeypatch, triton_3_6) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert backend.triton_trouble(0).endswith(
        "this torch is for AMD's: set MEGALITE_KERNELS=torch to run plain torch (slower)"
    )


@interpreted
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


def test_an_empty_variable_counts_as_unset(monkeypatch, usable) -> None:
    usable(None)
    monkeypatch.setenv(backend.VARIABLE, "")
    assert backend.runs_fused(ON_GPU)
    assert not backend.runs_fused(ON_CPU)


def test_other_words_are_refused(monkeypatch) -> None:
    assert backend.CHOICES == KERNEL_BACK_ENDS, "what is checked before a run starts"
    with (
        pytest.raises(ValueError, match="use_backend: 'cuda' is not a back end; choose one of"),
        use_backend("cuda"),
    ):
        pass
    monkeypatch.setenv(backend.VARIABLE, "Triton")
    with pytest.raises(ValueError, match="MEGALITE_KERNELS: 'Triton' is not a back end"):
        backend.runs_fused(ON_CPU)


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch) -> None:
    monkeypatch.setattr(backend, "INTERPRETING", False)
    with use_backend("triton"), pytest.raises(BackendError, match="TRITON_INTERPRET=1"):
        backend.runs_fused(ON_CPU)


@pytest.mark.parametrize("word", ["1", "true", "TRUE", "on", "yes", "Y", "0", "no", "2", ""])
def test_the_interpreter_is_asked_for_as_triton_reads_it(monkeypatch, word: str) -> None:
    knobs = pytest.importorskip("triton.knobs")
    monkeypatch.setenv("TRITON_INTERPRET", word)
    assert backend.interpreter_asked() is knobs.runtime.interpret


def test_a_choice_ends_with_its_block(usable) -> None:
    usable(None)
    with pytest.raises(ValueError, match="'cuda'"), use_backend("torch"), use_backend("cuda"):
        pass
    assert backend.runs_fused(ON_GPU)


@interpreted
def test_what_is_computed_again_in_another_thread_is_served_alike() -> None:
    """As autograd does for CUDA tensors, which it differentiates in threads of its own."""
    x = torch.randn(3, 8, requires_grad=True)
    served: list[bool] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        served.append(backend.runs_fused(x))
        return megalite_kernels.swiglu(x)

    with use_backend("triton"):
        y = checkpoint(forward, x, use_reentrant=False)
        thread = threading.Thread(target=y.sum().backward)
        thread.start()
        thread.join()
    assert served == [True, True]
    assert x.grad is not None


# A compiler


@interpreted
def test_compiled_functions_follow_the_choice() -> None:
    torch.compiler.reset()
    x = torch.randn(3, 8)
    graphs = []

    def keep(graph, inputs):
        graphs.append("megalite.swiglu" in graph.code)
        return graph.forward

    compiled = torch.compile(megalite_kernels.swiglu, backend=keep, fullgraph=True)
    for name in ("torch", "triton"):
        with use_backend(name):
            torch.testing.assert_close(compiled(x), megalite_kernels.swiglu(x))
    assert graphs == [False, True]

    def within(x):
        with use_backend("triton"):
            y = megalite_kernels.swiglu(x)
        return y, megalite_kernels.swiglu(x)

    with use_backend("torch"):
        y, z = torch.compile(within, backend="aot_eager", fullgraph=True)(x)
        assert backend.chosen_backend() == "torch"
    torch.testing.assert_close(y, z)


def test_a_compiled_function_names_what_cannot_serve_it(monkeypatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(backend, "INTERPRETING", False)
    monkeypatch.setenv(backend.VARIABLE, "triton")
    with pytest.raises(BackendError, match="TRITON_INTERPRET=1"):
        torch.compile(megalite_kernels.swiglu, backend="eager")(torch.ones(2, 4))
    whole = torch.compile(megalite_kernels.swiglu, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="TRITON_INTERPRET=1"):
        whole(torch.ones(2, 4))
    monkeypatch.setenv(backend.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="'cuda' is not a back end"):
        torch.compile(megalite_kernels.swiglu, backend="eager")(torch.ones(2, 4))


# Without Triton

WITHOUT_TRITON = """
import sys

class Refusal:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refusal())

from types import SimpleNamespace
import torch
import megalite_kernels
from megalite import pretrain
from megalite_kernels import backend

flags = "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --ffn-hidden-size 24 --mock-data"
flags += " --seq-length 16 --global-batch-size 2 --micro-batch-size 2 --steps 2"
flags += " --sample-length 0 --eval-steps 0"
flags += " --vocab-size 64 --lr-warmup-steps 0 --no-save-weights --device cpu --recompute full"
assert pretrain.main([*flags.split(), "--runs", sys.argv[1]]) == 0
try:
    backend.runs_fused(SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16))
except megalite_kernels.BackendError as error:
    print(error, file=sys.stderr)
assert "triton" not in sys.modules
"""


def test_plain_torch_needs_no_triton(tmp_path) -> None:
    """It exists on Linux only."""
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert "step 2/2" in result.stdout
    assert result.stderr == (
        "megalite's kernels on a GPU need triton, which is not installed: pip install triton, or "
        "set MEGALITE_KERNELS=torch to run plain torch (slower)\n"
    )


# What a run names


@interpreted
def test_names_for_the_opening_lines() -> None:
    import triton

    cpu = torch.device("cpu")
    assert back_ends(cpu, torch.float32) == dict.fromkeys(OPERATIONS, "torch")
    with use_backend("triton"):
        served = back_ends(cpu, torch.float32)
    assert set(served.values()) == {f"triton {triton.__version__}"}


def parameters(name: str, *homes: object) -> list[str]:
    """Of the operation in the one of these modules that has it."""
    (found,) = {getattr(home, name) for home in homes if hasattr(home, name)}
    return list(inspect.signature(found).parameters)


def operations() -> list[str]:
    others = ("OPERATIONS", "BackendError", "back_ends", "use_backend")
    return [name for name in megalite_kernels.__all__ if name not in others]


def test_definitions_are_called_as_the_page_is() -> None:
    """So that no argument is lost, but for those that say where a result is made."""
    for name in operations():
        page = parameters(name, megalite_kernels)
        names = [p for p in page if p not in ("inplace", "main_grad", "chunk_rows")]
        homes = (megalite_kernels.reference, megalite_kernels.reference_cross_entropy)
        assert parameters(name, *homes) == names, name


def test_kernels_are_called_as_the_page_is() -> None:
    pytest.importorskip("triton")
    modules = (
        *("adamw", "cross_entropy", "linear_cross_entropy", "rms_norm", "rope", "softmax"),
        *("swiglu", "vocab_parallel"),
    )
    homes = [importlib.import_module(f"megalite_kernels.fused.{module}") for module in modules]
    for name in operations():
        assert parameters(name, *homes) == parameters(name, megalite_kernels), name
