"""`python -m megalite.doctor` as people start it."""

from __future__ import annotations

import json
import subprocess
import sys

DOCTOR = [sys.executable, "-m", "megalite.doctor", "--device", "cpu"]
VERBS = {
    "all_reduce",
    "all_reduce (maximum)",
    "all_gather",
    "reduce_scatter",
    "broadcast",
    "send / recv",
}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """The doctor takes ten seconds, and a minute where much else runs."""
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


def test_table() -> None:
    result = run(*DOCTOR)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("megalite doctor ") and lines[-1] == "all is well"
    components = {line[2:].split("  ")[0] for line in lines if line.startswith("  ")}
    wanted = {"python", "torch", "GPUs", "gloo", "triton", "kernels"}
    wanted |= {"attention", "NVIDIA apex", "flash-attn", "tokenizers", "TensorBoard"}
    assert wanted | VERBS - {"all_reduce (maximum)"} <= components


def test_kernels_that_cannot_run_here(monkeypatch) -> None:
    monkeypatch.setenv("MEGALITE_KERNELS", "triton")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = run(*DOCTOR, "--json")
    assert (result.returncode, result.stderr) == (1, "")
    told = json.loads(result.stdout)
    (row,) = [one for one in told["components"] if one["component"] == "kernels"]
    assert (row["state"], row["runs"]) == ("BROKEN", "none can run on the CPU")
    assert row["why"].startswith("MEGALITE_KERNELS=triton: ")
    assert told["problems"] == [f"kernels: {row['why']}"]
    assert told["collectives"] and not told["operations"]
    monkeypatch.setenv("MEGALITE_KERNELS", "foo")
    result = run(*DOCTOR)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("megalite: MEGALITE_KERNELS=foo is not a back end")


def test_json_under_torchrun_with_three_ranks() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3"]
    result = run(*launcher, *DOCTOR[1:], "--json")
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout[result.stdout.index("{") :])
    assert {one["verb"] for one in told["collectives"]} == VERBS
    assert all(speed > 0 for one in told["collectives"] for speed in one["bandwidth"].values())
    assert not told["problems"]


def test_json_of_ranks_that_cannot_start(monkeypatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no_such_interface")
    result = run(*DOCTOR, "--json")
    assert result.returncode != 0
    told = json.loads(result.stdout)
    assert told["components"] and told["problems"] == ["the self-test did not finish"]


def test_one_rank_has_no_collectives() -> None:
    result = run(*DOCTOR, "--ranks", "1")
    assert result.returncode == 0
    assert "one rank: no collectives to test" in result.stdout


def test_bad_flags() -> None:
    result = run(*DOCTOR, "--ranks", "-3")
    assert (result.returncode, result.stderr) == (2, "megalite: --ranks -3 must be above 0\n")
    result = run(*DOCTOR, "--rank", "x")
    assert result.returncode == 2 and "Traceback" not in result.stderr
