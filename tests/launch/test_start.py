"""Real launches: our own ranks, torchrun's, srun's; and what a newcomer sees."""

from __future__ import annotations

import functools
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pool import free_port
from runs import SMALL, Run, launch, pretrain_command, read_run, worst

STEPS = 10
FLAGS = [*SMALL, "--steps", str(STEPS), "--lr-warmup-steps", "5"]
BOUNDS = {"fp32": (1e-5, 1e-4, 1e-5), "fp64": (1e-11, 1e-10, 1e-11)}
"""(relative loss, relative gradient norm, absolute weight) by precision."""

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Two threads that share a core with other work wait for each other most of the time."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one-rank runs, by precision."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one_rank_in(runs: Path) -> Callable[[str], Run]:
    """The one-rank run in a precision, launched once."""

    @functools.cache
    def run(precision: str) -> Run:
        flags = [*FLAGS, "--precision", precision, "--runs", str(runs), "--name", precision]
        result = launch(pretrain_command(*flags, "--device", "cpu"), env=ONE_THREAD)
        assert result.returncode == 0, result.stderr
        return read_run(runs / precision, result.stdout)

    return run


@pytest.fixture
def one_rank(one_rank_in: Callable[[str], Run]) -> Run:
    return one_rank_in("fp32")


def equals(run: Run, other: Run, precision: str = "fp32") -> None:
    loss_bound, norm_bound, weight_bound = BOUNDS[precision]
    assert len(run.losses) == STEPS
    assert worst(run.losses, other.losses) <= loss_bound
    assert worst(run.grad_norms, other.grad_norms) <= norm_bound
    for name, weight in other.weights.items():
        assert (run.weights[name] - weight).abs().max() <= weight_bound


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        ("--tp 2 --pp 2", "fp32"),
        *(
            pytest.param(*rest, marks=pytest.mark.full)
            for rest in (
                ("--dp 2 --tp 2", "fp64"),
                ("--tp 2 --pp 2", "fp64"),
                ("--dp 2 --tp 2", "fp32"),
                ("--pp 4", "fp32"),
                ("--pp 4", "fp64"),
            )
        ),
    ],
)
def test_self_launch_equals_one_rank(
    one_rank_in: Callable[[str], Run], tmp_path: Path, layout: str, precision: str
) -> None:
    flags = [*FLAGS, "--precision", precision, *layout.split(), "--name", "many"]
    result = launch(pretrain_command(*flags, "--runs", str(tmp_path), "--device", "cpu"))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    equals(read_run(tmp_path / "many"), one_rank_in(precision), precision)


def test_two_torchrun_agents_equal_one_rank(one_rank: Run, tmp_path: Path) -> None:
    """Two 'machines' of two ranks each: tp 2 on each, pp 2 across."""
    port = free_port()
    flags = [*FLAGS, "--tp", "2", "--pp", "2", "--runs", str(tmp_path), "--device", "cpu"]
    agents = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
                *("--node-rank", str(node), "--nproc-per-node", "2", "--master-addr", "127.0.0.1"),
                *("--master-port", str(port), "-m", "megalite.pretrain", *flags),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        for node in range(2)
    ]
    outputs = [agent.communicate(timeout=180) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert outputs[0][0].count("megalite 0.") == 1, "rank 0 alone speaks"
    assert outputs[1][0] == ""
    (folder,) = tmp_path.iterdir()
    equals(read_run(folder), one_rank)


def test_srun_equals_one_rank(one_rank: Run, tmp_path: Path) -> None:
    """Two tasks with the variables that srun sets, and none of torchrun's."""
    flags = [*FLAGS, "--dp", "2", "--runs", str(tmp_path), "--device", "cpu"]
    slurm = {
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NODEID": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    tasks = [
        subprocess.Popen(
            pretrain_command(*flags),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **slurm, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
        )
        for i in range(2)
    ]
    outputs = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    (folder,) = tmp_path.iterdir()
    equals(read_run(folder), one_rank)


def test_the_opening_says_what_runs(one_rank: Run) -> None:
    for words in (
        "tp 1 x pp 1 x dp 1 = 1 rank",
        "device      CPU (gloo)",
        "\n  kernels     attention: torch SDPA; "
        "torch: rms_norm, add_rms_norm, rope, swiglu, cross_entropy, adamw\n",
        "parameters  memory per rank",
        "source text of Python's standard library",
        "entropy",
        f"step {STEPS}/{STEPS}  loss",
        "final train loss",
        "weights/",
        "next:",
    ):
        assert words in one_rank.stdout, words


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tp", "3", "--pp", "9"], ["--tp 3", "--pp 9 makes 9 stages, more than", "problems"]),
        (["--data", "/no/such/file.txt"], ["/no/such/file.txt"]),
        (["--bogus"], ["unknown flag --bogus"]),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(flags: list[str], words: list[str]) -> None:
    result = launch(pretrain_command(*flags))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    for word in words:
        assert word in result.stderr


def test_a_wrong_choice_of_kernels_is_told_with_all_else() -> None:
    result = launch(pretrain_command("--tp", "3"), env={"MEGALITE_KERNELS": "foo"})
    assert (result.returncode, result.stdout) == (2, "")
    first, second, *_ = result.stderr.splitlines()[1:]
    assert first == (
        "  - MEGALITE_KERNELS=foo is not a back end of the kernels; "
        "choose one of auto, triton, torch"
    )
    assert "--tp 3" in second
    assert launch(pretrain_command("--print-config"), env={"MEGALITE_KERNELS": ""}).returncode == 0


@pytest.mark.parametrize(
    ("launcher", "program"),
    [
        ("", "pretrain"),
        ("", "verify"),
        ("torchrun", "pretrain"),
        pytest.param("torchrun", "verify", marks=pytest.mark.full),
    ],
)
def test_kernels_that_cannot_run_here_are_told_before_a_rank_starts(
    launcher: str, program: str, tmp_path: Path
) -> None:
    started = "torch.distributed.run --nproc-per-node 2 -m".split() if launcher else []
    where = ["--runs", str(tmp_path / "runs")] if program == "pretrain" else []
    command = [sys.executable, "-m", *started, f"megalite.{program}", *SMALL, *where]
    environment = {"MEGALITE_KERNELS": "triton", "TRITON_INTERPRET": "0"}
    result = launch([*command, "--dp", "2", "--device", "cpu"], env=environment)
    assert result.returncode == (1 if launcher else 2), "torchrun has exit codes of its own"
    ours = [line for line in result.stderr.splitlines() if "MEGALITE_KERNELS" in line]
    assert ours == [
        "megalite: MEGALITE_KERNELS=triton: on a CPU the kernels need Triton's interpreter; "
        "set TRITON_INTERPRET=1 before the start, or MEGALITE_KERNELS to auto or torch"
    ]
    assert launcher or result.stderr == ours[0] + "\n"
    assert not (tmp_path / "runs").exists()


def test_a_softmax_of_its_own_is_named_too(tmp_path: Path) -> None:
    flags = [*SMALL, "--steps", "1", "--attention", "fused-softmax", "--lr-warmup-steps", "0"]
    result = launch(pretrain_command(*flags, "--runs", str(tmp_path), "--device", "cpu"))
    assert (
        "  kernels     attention: matrix products and softmax; "
        "torch: rms_norm, add_rms_norm, rope, softmax, swiglu, cross_entropy, adamw\n"
    ) in result.stdout


def test_explicit_cuda_without_gpus_is_refused(tmp_path: Path) -> None:
    flags = [*SMALL, "--device", "cuda", "--runs", str(tmp_path / "runs")]
    result = launch(pretrain_command(*flags), env={"CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 2
    assert "--device cuda: 0 GPUs for 1 rank on this machine" in result.stderr
    assert not (tmp_path / "runs").exists(), "nothing is left behind"


def test_a_run_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metrics.jsonl").write_text("precious")
    result = launch(
        pretrain_command(*SMALL, "--runs", str(tmp_path), "--name", "mine", "--device", "cpu")
    )
    assert result.returncode == 2
    assert "--name mine" in result.stderr
    assert (tmp_path / "mine" / "metrics.jsonl").read_text() == "precious"


def test_a_saved_configuration_runs_again(one_rank: Run, runs: Path) -> None:
    again = pretrain_command("--config", str(runs / "fp32" / "config.json"), "--name", "again")
    assert launch(again, env=ONE_THREAD).returncode == 0
    assert read_run(runs / "again").losses == one_rank.losses


@pytest.mark.parametrize(
    ("flags", "limit_s"),
    [
        (["--help"], 0.5),
        (["--dry-run", "--model", "llama3-70b", "--tp", "8", "--pp", "4", "--dp", "16"], 1.0),
        (["--dry-run", "--tp", "4", "--pp", "2"], 1.0),
        (["--print-config"], 1.0),
    ],
)
def test_planning_is_quick_and_needs_no_torch(flags: list[str], limit_s: float) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = launch(pretrain_command(*flags))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0
    assert result.stdout
    # Time on a core, which other work on the machine does not stretch.
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < limit_s
    code = (
        "import sys; from megalite import pretrain\n"
        f"try: pretrain.main({flags!r})\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert launch([sys.executable, "-c", code]).returncode == 0
