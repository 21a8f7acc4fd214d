"""All .bin/.idx datasets of a folder into one.

python tools/merge_datasets.py --input parts --output-prefix corpus_text_document

They follow each other in the natural order of their names: part_2 before part_10. All of them were
written with one tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

from megalite.errors import ConfigError
from megalite.preprocessing.flags import (
    Flag,
    end,
    read_flags,
    terminate_as_interrupt,
    together,
)
from megalite.preprocessing.merge import find_datasets, merge
from megalite.preprocessing.settings import prefix_problems
from megalite.wording import counted

FLAGS = (
    Flag("--input", "Folder of the datasets to merge.", metavar="FOLDER", required=True),
    Flag(
        "--output-prefix",
        "PREFIX.bin, .idx and .json are written, the last if every dataset has one.",
        metavar="PREFIX",
        required=True,
    ),
)
REFUSED = MappingProxyType({"--multimodal": "datasets hold text alone"})


def main(argv: Sequence[str]) -> int:
    """Run the tool; returns its exit code."""
    values, problems = read_flags(
        argv, FLAGS, prog="merge_datasets.py", description=__doc__ or "", refused=REFUSED
    )
    if not values["input"] or not values["output_prefix"]:
        raise ConfigError(problems)
    output = Path(values["output_prefix"])
    problems += prefix_problems(values["output_prefix"], [output])
    prefixes = together(problems, lambda: find_datasets(Path(values["input"])))
    for prefix in prefixes:
        print(prefix)
    sidecar = merge(prefixes, output)
    if sidecar is None:
        print(f"{output}.bin, .idx; no .json, as one of the datasets has none")
    else:
        print(
            f"{output}.bin, .idx, .json: {counted(sidecar.documents, 'document')}, "
            f"{counted(sidecar.tokens, 'token')}"
        )
    return 0


if __name__ == "__main__":
    terminate_as_interrupt()
    end(main)
