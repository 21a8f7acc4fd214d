"""What is in a checkpoint, is it whole, and what differs between two?

python tools/inspect_checkpoint.py --input checkpoints                   which there are; the newest
python tools/inspect_checkpoint.py --input checkpoints/step-00001200 --tensors
python tools/inspect_checkpoint.py --input checkpoints --verify          read every byte
python tools/inspect_checkpoint.py --input A --diff B                    tensor by tensor
python tools/inspect_checkpoint.py --input A --tp 4 --pp 2 --zero 1      memory in that layout

Exit code 2 for bad input, 3 if anything is damaged, 1 if two differ.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path

from megalite import report
from megalite.checkpoint.directory import Directory
from megalite.checkpoint.inspection import contents, differences, tensor_lines
from megalite.checkpoint.reader import Checkpoint
from megalite.config import resolve
from megalite.config_file import saved_config
from megalite.errors import ConfigError, DamagedError
from megalite.preprocessing.flags import Flag, Values, end, read_flags
from megalite.wording import counted

LAYOUT = ("tp", "pp", "dp", "zero")

FLAGS = (
    Flag(
        "--input",
        "A checkpoint, or a folder of them, of which the newest is taken.",
        metavar="DIR",
        required=True,
    ),
    Flag("--tensors", "List every tensor: type, shape, and which files have it.", False),
    Flag("--verify", "Read every byte, and compare it with the digests.", False),
    Flag("--diff", "Another one, to compare with.", metavar="DIR"),
    Flag("--tp", "Memory of a run that goes on from it: tensor-parallel ranks.", None),
    Flag("--pp", "Likewise: pipeline-parallel ranks.", None),
    Flag("--dp", "Likewise: data-parallel ranks.", None),
    Flag("--zero", "Likewise: what data ranks shard.", None),
)


def main(argv: Sequence[str]) -> int:
    """Run the tool; returns its exit code."""
    values, problems = read_flags(
        argv, FLAGS, prog="inspect_checkpoint.py", description=__doc__ or ""
    )
    if problems:
        raise ConfigError(problems)
    path = Path(values["input"])
    if not path.is_dir():
        raise ConfigError(f"--input {path} is no folder")
    for step, wrong in Directory(path).valid_steps():
        print(f"step {step}: {wrong or 'manifest, sizes and headers are right'}")
    checkpoint = Checkpoint.newest(path)
    print(contents(checkpoint))
    if values["tensors"]:
        print("\n".join(tensor_lines(checkpoint)))
    if any(values[name] is not None for name in LAYOUT):
        print(in_layout(checkpoint, values))
    if values["verify"]:
        verify(checkpoint)
    if values["diff"]:
        return diff(checkpoint, Checkpoint.newest(Path(values["diff"])))
    return 0


def in_layout(checkpoint: Checkpoint, values: Values) -> str:
    """What each rank would need.

    Raises:
        ConfigError: it holds no configuration, or the layout is impossible.
    """
    from megalite.check import check

    folder = checkpoint.folder
    saved = saved_config(folder / "manifest.json", checkpoint.manifest.facts.get("config", {}))
    asked = {name: values[name] for name in LAYOUT if values[name] is not None}
    one = {"tp": 1, "pp": 1, "dp": 1, "zero": -1, "chunks": 0, "pp_layers": ()}
    config = resolve(saved.given().replace(**{**one, "schedule": "1f1b", "save": "", **asked}))
    check(config)
    return report.rank_table(config)


def verify(checkpoint: Checkpoint) -> None:
    """Read all of it, and say how fast that was.

    Raises:
        DamagedError: with every damage.
    """
    begun = time.perf_counter()
    damages = checkpoint.damages()
    seconds = time.perf_counter() - begun
    if damages:
        raise DamagedError([f"{checkpoint.folder}: {damage}" for damage in damages])
    size = sum(file.num_bytes for file in checkpoint.manifest.files)
    print(
        f"every byte is right: {size / 1e9:.2f} GB in {seconds:.1f} s, "
        f"{size / 1e9 / max(seconds, 1e-9):.2f} GB/s"
    )


def diff(ours: Checkpoint, theirs: Checkpoint) -> int:
    """Print what differs; returns 1 if anything does."""
    found = list(differences(ours, theirs))
    print("\n".join(found) or "no difference")
    if found:
        print(counted(len(found), "difference"))
    return int(bool(found))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as in `... | head`
    end(main)
