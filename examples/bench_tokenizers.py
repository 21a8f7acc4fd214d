"""Speed of every tokenizer beside the bare library that does the same, on one thread.

    python examples/bench_tokenizers.py                    on Python's own sources
    python examples/bench_tokenizers.py --text big.txt
    python examples/bench_tokenizers.py --ranks cl100k_base.tiktoken --pattern cl100k_base

Vocabularies of 16,000 tokens (SentencePiece: 4,000) are trained on the text. Each line is the
median of runs in which both sides take turns, a hundred documents each, so that a busy machine
slows both alike; each run is by a new tokenizer of ours, which remembers no word yet. `of the
library` is our throughput over that of the bare library: sentencepiece, tiktoken or tokenizers,
which the extra `test` installs.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megalite.tokenizer.base import Tokenizer
from megalite.tokenizer.bpe import gpt2_tokenizer, rank_tokenizer
from megalite.tokenizer.byte import ByteTokenizer
from megalite.tokenizer.files import read_gpt2, read_ranks
from megalite.tokenizer.hf import HuggingFaceTokenizer
from megalite.tokenizer.patterns import STYLES
from megalite.tokenizer.sentencepiece import SentencePieceTokenizer
from megalite.tokenizer.settings import PATTERNS

VOCAB_SIZE = 16_000
DOCUMENT_CHARACTERS = 4000
TURN_DOCUMENTS = 100


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: of the tokenizer.
        open: a new tokenizer.
        library: the same by the bare library; None: there is none.
    """

    name: str
    open: Callable[[], Tokenizer]
    library: Callable[[str], Sequence[int]] | None = None


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", help="a text file; default: the standard library's sources")
    parser.add_argument("--ranks", help="a tiktoken rank file; default: trained on the text")
    parser.add_argument(
        "--pattern",
        choices=PATTERNS,
        nargs="*",
        default=PATTERNS[:4],
    )
    parser.add_argument("--megabytes", type=float, default=8.0, help="of text, at most (8)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each tokenizer (5)")
    options = parser.parse_args()
    text = read_text(options.text)[: int(options.megabytes * 1e6)]
    documents = [
        text[start : start + DOCUMENT_CHARACTERS]
        for start in range(0, len(text), DOCUMENT_CHARACTERS)
    ]
    size = len(text.encode())
    print(f"{size / 1e6:.1f} MB in {len(documents)} documents, {options.repeats} runs, medians")
    print(f"{'tokenizer':<34s} {'MB/s':>7s} {'Mtok/s':>7s} {'B/tok':>6s} {'of the library':>15s}")
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(Path(folder), text, options.ranks, options.pattern):
            print(measure(row, documents, size, options.repeats), flush=True)


def read_text(path: str | None) -> str:
    """The file, or as much Python source as there is: code, and English in its docstrings."""
    if path:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(root.glob("*.py")) + sorted(root.glob("[a-z]*/*.py"))
    return "".join(file.read_text(encoding="utf-8", errors="replace") for file in files[:400])


def measure(row: Row, documents: Sequence[str], size: int, repeats: int) -> str:
    """A line of the table, from runs in turns."""
    ours, theirs = [], []
    for _ in range(repeats):
        tokenizer = row.open()
        tokenizer.encode("what is built when it is first needed")
        ours.append(0.0)
        theirs.append(0.0)
        for start in range(0, len(documents), TURN_DOCUMENTS):
            turn = documents[start : start + TURN_DOCUMENTS]
            ours[-1] += seconds(tokenizer.encode, turn)
            if row.library is not None:
                theirs[-1] += seconds(row.library, turn)
    tokens = sum(len(tokenizer.encode(document)) for document in documents)
    median = statistics.median(ours)
    line = f"{row.name:<34s} {size / median / 1e6:7.2f} {tokens / median / 1e6:7.2f}"
    line += f" {size / tokens:6.2f}"
    if row.library is not None:
        # Of each run, not of the medians: what slows a run slows both.
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        line += f" {ratio:14.2f}x"
    return line


def seconds(encode: Callable[[str], Sequence[int]], documents: Sequence[str]) -> float:
    """CPU time of this process for all documents."""
    started = time.process_time()
    for document in documents:
        encode(document)
    return time.process_time() - started


def rows(folder: Path, text: str, ranks: str | None, patterns: Sequence[str]) -> Iterator[Row]:
    """All tokenizers, with vocabularies of the text."""
    yield Row("ByteTokenizer", ByteTokenizer)
    yield from sentencepiece_rows(folder, text)
    write_byte_level(folder, text)
    ranks = ranks or str(folder / "ranks.tiktoken")
    for pattern in patterns:
        yield from rank_rows(ranks, pattern)
    yield from hugging_face_rows(folder)


def sentencepiece_rows(folder: Path, text: str) -> Iterator[Row]:
    """SentencePiece models of both kinds."""
    import sentencepiece

    lines = [line for line in text[:1_000_000].splitlines() if line.strip()]
    for kind in ("bpe", "unigram"):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=VOCAB_SIZE // 4,
            model_type=kind,
            byte_fallback=True,
            hard_vocab_limit=False,  # a short text gives fewer
            minloglevel=2,
        )
        path = folder / f"{kind}.model"
        path.write_bytes(model.getvalue())
        bare = sentencepiece.SentencePieceProcessor(model_file=str(path))
        ours = partial(SentencePieceTokenizer, str(path), bos=False)
        yield Row(f"SentencePieceTokenizer, {kind}", ours, bare.encode)


def write_byte_level(folder: Path, text: str) -> None:
    """One byte-level BPE in all formats: tokenizer.json, GPT-2's pair, tiktoken's ranks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(text.splitlines(keepends=True), trainer)
    model.add_special_tokens(["<|endoftext|>"])
    model.save(str(folder / "tokenizer.json"))
    learned = json.loads(model.to_str())["model"]
    vocabulary = {**learned["vocab"], "<|endoftext|>": len(learned["vocab"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = "".join(f"{' '.join(pair)}\n" for pair in learned["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    _, ranks, _ = read_gpt2(str(folder / "vocab.json"), str(folder / "merges.txt"))
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (folder / "ranks.tiktoken").write_text("".join(lines))


def rank_rows(path: str, pattern: str) -> Iterator[Row]:
    """A rank file by the regex package, and by tiktoken."""
    import tiktoken

    style = STYLES[pattern]
    ranks = read_ranks(path)
    bare = tiktoken.Encoding(
        pattern, pat_str=style.pattern, mergeable_ranks=ranks, special_tokens={}
    )
    for engine in ("regex", "tiktoken"):
        ours = partial(rank_tokenizer, path, pattern, engine=engine)
        yield Row(f"TikTokenizer, {pattern}, {engine}", ours, bare.encode_ordinary)


def hugging_face_rows(folder: Path) -> Iterator[Row]:
    """GPT-2's files, and tokenizer.json."""
    from tokenizers import Tokenizer

    bare = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def library(text: str) -> Sequence[int]:
        return bare.encode(text).ids

    gpt2 = partial(gpt2_tokenizer, str(folder / "vocab.json"), str(folder / "merges.txt"))
    yield Row("GPT2BPETokenizer", gpt2, library)
    ours = partial(HuggingFaceTokenizer, str(folder / "tokenizer.json"))
    yield Row("HuggingFaceTokenizer", ours, library)


if __name__ == "__main__":
    main()
