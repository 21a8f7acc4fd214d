"""Text into .bin/.idx datasets that Megatron-LM, NeMo and megalite read alike.

python tools/preprocess_data.py --input corpus.jsonl --output-prefix corpus --append-eod
python tools/preprocess_data.py --input 'part_*.jsonl.gz' --output-prefix corpus \\
    --tokenizer-type Llama2Tokenizer --tokenizer-model llama2.model --workers 16 --append-eod

writes corpus_text_document.bin, .idx, and a .json that says what they are made of. The output is
the same for every number of workers. What an interrupted run has done is kept: --resume goes on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from types import MappingProxyType

from megalite.preprocessing.allocation import keep_freed_memory
from megalite.preprocessing.flags import (
    Flag,
    end,
    read_flags,
    terminate_as_interrupt,
    together,
)
from megalite.preprocessing.progress import ProgressLine, summary
from megalite.preprocessing.reading_flags import ENCODING_FLAGS
from megalite.preprocessing.run import prepare
from megalite.preprocessing.settings import Settings
from megalite.preprocessing.tokenizer_flags import (
    TOKENIZER_FLAGS,
    tokenizer_problems,
    tokenizer_settings,
)
from megalite.reading.chunks import TEXT_DOCUMENTS

FLAGS = (
    Flag(
        "--input",
        "Files (.jsonl, .json, .txt, also .gz or .zst, or .parquet), folders, globs, or - for JSON "
        "Lines on standard input. They are read in the order given; what a folder or glob names, "
        "part_2 before part_10.",
        (),
        metavar="PATH",
        required=True,
    ),
    Flag(
        "--output-prefix",
        "PREFIX_KEY_document.bin, .idx and .json are written, for each of --json-keys.",
        metavar="PREFIX",
        required=True,
    ),
    Flag(
        "--json-keys",
        "Fields of a JSON object, or columns of a parquet file, that hold text; each becomes a "
        "dataset of its own.",
        ("text",),
        metavar="KEY",
    ),
    Flag(
        "--append-eod",
        "End each document with the end-of-document token, as one does for pretraining: a sample "
        "holds several documents.",
        False,
    ),
    Flag("--workers", "Processes that encode, at best as many as cores.", os.cpu_count() or 1),
    Flag(
        "--text-documents",
        "What a document of a .txt file is: the whole file, a line, or what stands between blank "
        "lines.",
        "file",
        choices=TEXT_DOCUMENTS,
    ),
    *ENCODING_FLAGS,
    Flag("--resume", "Go on where the same command was interrupted.", False),
    Flag("--log-interval", "A line of progress every N documents; 0: every few seconds.", 0),
    Flag("--partitions", "Of Megatron-LM, without effect: --workers says how many work.", 1),
    Flag(
        "--keep-sequential-samples",
        "Of Megatron-LM, without effect: the order is always the input's.",
        False,
    ),
    Flag("--dataset-impl", "Of Megatron-LM, without effect: there is one format.", "mmap"),
    *TOKENIZER_FLAGS,
)
REFUSED = MappingProxyType(
    {
        "--split-sentences": "sentences serve BERT; a document is one sequence here",
        "--keep-newlines": "it belongs to --split-sentences; newlines are always kept",
        "--lang": "it belongs to --split-sentences",
        "--find-optimal-num-workers": "the progress line shows MB/s; workers up to the number of "
        "cores help",
        "--workers-to-check": "it belongs to --find-optimal-num-workers",
        "--max-documents": "it belongs to --find-optimal-num-workers",
        "--performance-dir": "it belongs to --find-optimal-num-workers",
    }
)


def main(argv: Sequence[str]) -> int:
    """Run the tool; returns its exit code."""
    values, problems = read_flags(
        argv, FLAGS, prog="preprocess_data.py", description=__doc__ or "", refused=REFUSED
    )
    if values["dataset_impl"] != "mmap":
        problems.append(
            f"--dataset-impl {values['dataset_impl']} is not in megalite: Megatron-LM itself reads "
            "mmap only"
        )
    if values["partitions"] < 1:
        problems.append(f"--partitions {values['partitions']}: a number of parts is 1 or more")
    problems += tokenizer_problems(values)
    settings = Settings(
        inputs=values["input"],
        output_prefix=values["output_prefix"],
        tokenizer=tokenizer_settings(values),
        vocab_size=values["vocab_size"],
        json_keys=values["json_keys"],
        append_eod=values["append_eod"],
        workers=values["workers"],
        text_documents=values["text_documents"],
        max_document_mb=values["max_document_mb"],
        strict=values["strict"],
        resume=values["resume"],
        log_interval=values["log_interval"],
    )
    job = together(problems, lambda: prepare(settings))
    if values["partitions"] != 1:
        print(
            f"--partitions {values['partitions']}: nothing is partitioned, one pool of --workers "
            "serves; the documents keep the order of the input",
            file=sys.stderr,
        )
    keep_freed_memory()
    line = ProgressLine(sys.stderr, settings.log_interval)
    try:
        report = job.run(line.show)
    finally:
        line.close()
    print(summary(report))
    return 0


if __name__ == "__main__":
    terminate_as_interrupt()
    end(main)
