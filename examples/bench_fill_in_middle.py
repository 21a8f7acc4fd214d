"""How many tokens a second does one process rearrange for fill-in-the-middle?

    python examples/bench_fill_in_middle.py
    python examples/bench_fill_in_middle.py --rates 1 --mean 20 --ranks cl100k_base.tiktoken

Vocabularies are trained on the text as in bench_tokenizers.py. Documents of random lengths fill
samples, of which `--fim-rate` says how many documents are rearranged. The floor is the bare
tokenizer library on the parts of these documents: nothing that tokenizes them anew is faster. Both
take turns; CPU time of this process, medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from bench_tokenizers import Row, read_text, rows, seconds

from megalite.data.fill_in_middle import FillInTheMiddle
from megalite.data.sentinels import Sentinels
from megalite.tokenizer.base import Tokenizer


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", help="a text file; default: the standard library's sources")
    parser.add_argument("--ranks", help="a tiktoken rank file; default: trained on the text")
    parser.add_argument("--pattern", nargs="*", default=("cl100k_base",))
    parser.add_argument("--megabytes", type=float, default=4.0, help="of text, at most (4)")
    parser.add_argument("--rates", type=float, nargs="*", default=(0.5, 1.0), help="(0.5 1)")
    parser.add_argument("--mean", type=int, nargs="*", default=(20, 500), help="tokens (20 500)")
    parser.add_argument("--seq-length", type=int, default=4096, help="of a sample (4096)")
    parser.add_argument("--samples", type=int, default=8, help="of a turn (8)")
    parser.add_argument("--rounds", type=int, default=15, help="turns (15)")
    options = parser.parse_args()
    text = read_text(options.text)[: int(options.megabytes * 1e6)]
    print(f"{'million tokens/s':<34s} {'rate':>5s} {'mean':>5s} {'ours':>6s} {'floor':>6s}")
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(Path(folder), text, options.ranks, options.pattern):
            if row.library is None:
                continue
            for mean in options.mean:
                tokenizer = row.open()
                drawn = samples(tokenizer, text, mean, options.seq_length, options.samples)
                for rate in options.rates:
                    ours, floor = measure(row, tokenizer, list(drawn), rate, options.rounds)
                    line = f"{row.name:<34s} {rate:5.2f} {mean:5d} {ours:6.2f} {floor:6.2f}"
                    print(line, flush=True)


def samples(
    tokenizer: Tokenizer, text: str, mean: int, seq_length: int, count: int
) -> list[np.ndarray]:
    """Samples of documents of random lengths."""
    draw = np.random.default_rng(0)
    around = len(tokenizer.encode(""))
    found = []
    for _ in range(count):
        row: list[int] = []
        while len(row) <= seq_length:
            at = int(draw.integers(0, max(1, len(text) - 16 * mean)))
            size = int(draw.integers(1, 2 * mean))
            body = tokenizer.encode(text[at : at + 16 * mean])[: around + size]
            row += [*body, tokenizer.eod]
        found.append(np.array(row[: seq_length + 1], np.int64))
    return found


def measure(
    row: Row, tokenizer: Tokenizer, drawn: list[np.ndarray], rate: float, rounds: int
) -> tuple[float, float]:
    """Million tokens of samples per second: ours, and the library on what it has to tokenize."""
    size = tokenizer.vocab_size
    watched = Watched(tokenizer)
    marks = Sentinels(size, size + 1, size + 2)
    for _ in rearranged(FillInTheMiddle(rate, 0.5, watched, marks), drawn):
        pass
    transform = FillInTheMiddle(rate, 0.5, tokenizer, marks)
    assert row.library is not None
    ours, floor = [], []
    for _ in range(rounds):
        ours.append(seconds(lambda _: list(rearranged(transform, drawn)), [""]))
        floor.append(seconds(row.library, watched.texts))
    tokens = sum(len(each) - 1 for each in drawn) / 1e6
    return tokens / statistics.median(ours), tokens / statistics.median(floor)


def rearranged(transform: FillInTheMiddle, drawn: list[np.ndarray]) -> Iterator[np.ndarray]:
    """All samples, each drawn for as in a run."""
    for number, sample in enumerate(drawn):
        yield transform.sample(sample, np.random.Generator(np.random.Philox(key=[0, number])))


class Watched:
    """A tokenizer that keeps the texts that it is given."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.texts: list[str] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        self.texts.append(text)
        return self._tokenizer.encode(text)


if __name__ == "__main__":
    main()
