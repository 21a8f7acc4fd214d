"""Print the documents that a step of a run was trained on.

python -m megalite.data --run runs/x --step 1234            the documents, with their text
python -m megalite.data --run runs/x --step 1234 --json     for programs, with the whole text
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megalite.config_file import read_saved
from megalite.data.ledger import Entry, ledger
from megalite.data.record import NAME, read_record
from megalite.errors import ConfigError
from megalite.output import reader_gone
from megalite.wording import counted

SHOWN_CHARACTERS = 160
"""Of a piece's text; the rest is left out in the middle."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m megalite.data",
        description="Print the documents that a step of a run was trained on: dataset, number of "
        "the document, its tokens and their text. The last token of a sample is a label only.",
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="Folder of the run.")
    parser.add_argument(
        "--step", required=True, type=int, metavar="N", help="Step as logged, the first is 1."
    )
    parser.add_argument("--json", action="store_true", help="For programs, with the whole text.")
    options = parser.parse_args(argv)
    folder = Path(options.run)
    try:
        config = read_saved(folder / "config.json")
        record = read_record(folder)
        entries = ledger(config, options.step, record)
    except ConfigError as error:
        print(error.message(), file=sys.stderr)
        return 2
    if record is None:
        print(
            f"note: {folder} has no {NAME}, as runs of before it was kept: whether the data is "
            "still what the run was trained on is not known",
            file=sys.stderr,
        )
    if options.json:
        print(json.dumps([asdict(entry) for entry in entries], indent=2))
        return 0
    print(
        f"step {options.step} of {options.run}: {counted(len(entries), 'sample')} of "
        f"{counted(config.model.seq_length, 'token')} and a label"
    )
    for entry in entries:
        print("\n".join(_lines(entry)))
    return 0


def _lines(entry: Entry) -> list[str]:
    lines = [f"{entry.place}: sample {entry.sample}"]
    if not entry.pieces:
        lines.append("   random tokens")
    for piece, text in zip(entry.pieces, entry.texts, strict=True):
        where = f"{piece.dataset}, document {piece.document}, tokens {piece.start}-{piece.stop - 1}"
        lines.append(f"   {where}" + (f": {_short(text)!r}" if text is not None else ""))
    return lines


def _short(text: str) -> str:
    half = SHOWN_CHARACTERS // 2
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:half]} ... {text[-half:]}"


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        code = reader_gone()
    sys.exit(code)
