"""What is in a .bin/.idx dataset, and is it whole?

python tools/inspect_dataset.py --input corpus_text_document                 figures, lengths
python tools/inspect_dataset.py --input corpus_text_document --document 17   its text
python tools/inspect_dataset.py --input corpus_text_document --verify        read everything

Exit code 2 if anything is wrong.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

from megalite.errors import ConfigError, DataError
from megalite.preprocessing.flags import Flag, end, read_flags, together
from megalite.preprocessing.inspection import (
    document,
    document_text,
    histogram,
    open_dataset,
    statistics,
    verify,
)
from megalite.preprocessing.tokenizer_flags import (
    TOKENIZER_FLAGS,
    no_tokenizer_wanted,
    tokenizer_problems,
    tokenizer_settings,
)
from megalite.tokenizer.choose import open_tokenizer

FLAGS = (
    Flag(
        "--input",
        "The dataset: PREFIX of PREFIX.bin and PREFIX.idx, or one of the two.",
        metavar="PREFIX",
        required=True,
    ),
    Flag(
        "--document",
        "Print the document of this number, counted from 0. Its text needs the tokenizer that the "
        "dataset was written with.",
        None,
    ),
    Flag("--ids", "Print the document's token ids in place of its text.", False),
    Flag(
        "--verify",
        "Read all tokens; compare their range, number and checksums with PREFIX.json.",
        False,
    ),
    *TOKENIZER_FLAGS,
)


def main(argv: Sequence[str]) -> int:
    """Run the tool; returns its exit code."""
    values, problems = read_flags(argv, FLAGS, prog="inspect_dataset.py", description=__doc__ or "")
    wants_document = values["document"] is not None
    if not values["input"]:
        raise ConfigError(problems)
    if not wants_document:
        problems += values.no_effect("ids", "without --document")
        problems += no_tokenizer_wanted(values, "without --document")
    elif values["ids"]:
        problems += no_tokenizer_wanted(values, "with --ids, which are no text")
    else:
        problems += tokenizer_problems(values)
    dataset = together(problems, lambda: open_dataset(Path(values["input"])))
    if wants_document and values["ids"]:
        print(" ".join(str(token) for token in document(dataset, values["document"]).tolist()))
    elif wants_document:
        if dataset.sidecar is None and values["tokenizer_type"] == "auto":
            raise ConfigError(
                f"--document {values['document']}: no {dataset.prefix}.json says which tokenizer "
                "wrote it: give --tokenizer-type, or --ids for its tokens"
            )
        tokenizer = open_tokenizer(tokenizer_settings(values), values["vocab_size"])
        print(document_text(dataset, values["document"], tokenizer))
    if values["verify"]:
        wrong = verify(dataset, print)
        if wrong:
            raise DataError(wrong)
    elif not wants_document:
        print(statistics(dataset))
        print(histogram(dataset))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as in `... | head`
    end(main)
