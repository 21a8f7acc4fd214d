"""A built wheel, in a fresh environment and from another folder, trains."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from runs import SMALL, read_run

ROOT = Path(__file__).parents[2]


@pytest.mark.full
def test_a_wheel_trains_from_another_folder(tmp_path: Path) -> None:
    def run(*command: str, cwd: Path = tmp_path) -> str:
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        result = subprocess.run(
            command, cwd=cwd, env=env, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps")
    run(*pip, "-w", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("megalite-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "megalite_kernels/reference.py" in names
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "examples/"))]
    run(sys.executable, "-m", "venv", str(tmp_path / "venv"))
    python = str(tmp_path / "venv" / "bin" / "python")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel))
    # Its dependencies are those of this environment, found behind the wheel's own packages.
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])")
    dependencies = sysconfig.get_paths()["purelib"]
    (Path(packages.strip()) / "dependencies.pth").write_text(dependencies + "\n")
    location = run(python, "-c", "import megalite; print(megalite.__file__)")
    assert location.startswith(str(tmp_path / "venv"))
    flags = [*SMALL, "--tp", "2", "--pp", "2", "--name", "wheel", "--device", "cpu"]
    run(python, "-m", "megalite.pretrain", *flags)
    assert len(read_run(tmp_path / "runs" / "wheel").losses) == 5
    help_text = run(str(tmp_path / "venv" / "bin" / "megalite-pretrain"), "--help")
    assert "--tp RANKS" in help_text
