"""Rows of the doctor, without starting it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import megalite_kernels
from megalite.diagnosis import known_bad
from megalite.diagnosis.hardware import links_of
from megalite.diagnosis.operations import compare_operations
from megalite.diagnosis.packages import apex_status, packages
from megalite.diagnosis.row import Row, table

TOPOLOGY = """
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-47\t0
GPU1\tNV18\t X \tSYS\tPIX\t0-47\t0
GPU2\tSYS\tSYS\t X \tSYS\t48-95\t1
NIC0\tPIX\tPIX\tSYS\t X

Legend:
  X    = Self
"""


def test_links_are_read_from_the_matrix() -> None:
    assert links_of(TOPOLOGY) == {"NV18": 1, "SYS": 2}
    assert links_of("") == {}
    assert links_of("GPU0: NVIDIA H100") == {}


def test_operations_are_right_and_a_wrong_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    assert all(one.is_right for one in compare_operations(device))
    right = megalite_kernels.rms_norm
    monkeypatch.setattr(megalite_kernels, "rms_norm", lambda x, w, e: right(x, w, 10 * e))
    wrong = [one.operation for one in compare_operations(device) if not one.is_right]
    assert wrong == ["rms_norm"]


def install(folder: Path, *files: str) -> None:
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise SystemError('imported')")


def test_no_apex() -> None:
    assert apex_status() == (False, "not installed")


def test_the_stranger_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "apex/__init__.py", "apex/lib/libapex.py")
    monkeypatch.syspath_prepend(tmp_path)
    genuine, why = apex_status()
    assert not genuine and "not NVIDIA's" in why
    (row,) = [row for row in packages() if row.component == "NVIDIA apex"]
    assert (row.state, row.enable) == ("WARNING", "pip uninstall apex")


def test_the_genuine_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "apex/__init__.py", "apex/optimizers/fused_adam.py")
    monkeypatch.syspath_prepend(tmp_path)
    assert apex_status() == (False, f"{tmp_path}/apex was built without its CUDA extensions")
    install(tmp_path, "amp_C.py")
    assert apex_status() == (True, f"{tmp_path}/apex")


def test_flash_attention_for_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "flash_attn.py", "flash_attn-2.8.1.dist-info/METADATA")
    (tmp_path / "flash_attn-2.8.1.dist-info/METADATA").write_text(
        "Name: flash-attn\nVersion: 2.8.1"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (row,) = [row for row in packages() if row.component == "flash-attn"]
    assert row.state == "WARNING" and row.why.endswith("cannot be imported: imported")


def test_triton_of_torch() -> None:
    needs = ["numpy", 'triton==3.6.0; platform_system == "Linux"']
    assert known_bad.triton_wanted(needs) == "3.6.0"
    assert known_bad.triton_wanted(["triton>=3", "pytorch-triton==3.6.0"]) is None


@pytest.mark.parametrize(
    ("built", "gpu", "runs"),
    [
        (["sm_80", "sm_90"], (9, 0), True),
        (["sm_80"], (8, 9), True),
        (["sm_80"], (9, 0), False),
        (["sm_90"], (8, 0), False),
        (["sm_80", "compute_90"], (10, 0), True),
        (["sm_90a"], (9, 0), True),
        (["sm_120"], (12, 0), True),
    ],
)
def test_code_for_the_gpu(built: list[str], gpu: tuple[int, int], runs: bool) -> None:
    assert known_bad.serves(built, *gpu) is runs


def test_variables_that_slow_everything_down(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    before = known_bad.known_bad(2)
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    monkeypatch.setenv("NCCL_IB_DISABLE", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    new = [row for row in known_bad.known_bad(2) if row not in before]
    assert [row.enable for row in new] == ["unset NCCL_P2P_DISABLE", "unset OMP_NUM_THREADS"]


def test_a_host_name_that_others_cannot_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for address, told in (("127.0.1.1", 1), ("10.0.0.7", 0)):
        monkeypatch.setattr(known_bad.socket, "gethostbyname", lambda _, a=address: a)
        rows = [row for row in known_bad.known_bad(1) if row.component == "gloo"]
        assert len(rows) == told


def test_table_puts_reason_and_command_below() -> None:
    rows = [Row("a", "ok", "runs"), Row("long name", "slower", "x " * 60, "because", "do it")]
    lines = table(rows).splitlines()
    assert lines[0] == "  a          ok      runs"
    assert lines[-2:] == [" " * 21 + "because", " " * 21 + "$ do it"]
    assert max(map(len, lines)) <= 100
