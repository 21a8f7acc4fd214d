"""Speed and memory of preprocessing, side by side with its rivals on this machine.

    python examples/bench_preprocess.py                        SentencePiece and tiktoken, 32 MB
    python examples/bench_preprocess.py --megabytes 128 --rounds 5
    python examples/bench_preprocess.py --memory --megabytes 2000 --csv memory.csv --plot memory.svg

Each round runs, one after the other on the same text and with two processes,

    bare      the tokenizer's library alone: texts in memory, encoded one by one, nothing written
    megalite  `tools/preprocess_data.py --workers 2`, the whole command
    pool      what Megatron-LM's preprocess_data.py does: a pool maps single lines, 32 at a time,
              through JSON and the tokenizer; the parent appends document after document

"bare" and "pool" call the library as they would: the fastest call that gives a text's tokens (for
tiktoken `encode_to_numpy`, which makes no Python numbers), and the one in megatron-core's
TikTokenTokenizer and SentencePieceTokenizer (0.16), which for tiktoken also looks for special
tokens in the text. "megalite" and "pool" give the same file.

The figures are medians over the rounds, by wall time and by CPU time; where other work disturbs,
the second are the ones that mean something. Those of "bare" are of the encoding alone, the others
of the whole command with its start. `--memory` samples the resident memory of each process of one
run of the first library instead; `--plot` needs matplotlib (`pip install 'megalite[bench]'`).
The text is made here: words of Zipf's distribution, tokenizers trained on it.
"""

from __future__ import annotations

import argparse
import base64
import json
import multiprocessing
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

TOOL = Path(__file__).parents[1] / "tools/preprocess_data.py"
WORKERS = 2
SAMPLE_SECONDS = 0.5
SPECIAL_TOKENS = 1000
"""That Megatron-LM puts before a rank file's tokens."""


def main() -> None:
    """Run what was asked for and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=32, help="of text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--libraries", nargs="*", default=["sentencepiece", "tiktoken"])
    parser.add_argument("--memory", action="store_true", help="sample memory, not time")
    parser.add_argument("--csv", type=Path, help="where --memory writes its samples")
    parser.add_argument("--plot", type=Path, help="where --memory draws them: .svg, .png")
    parser.add_argument("--pool", nargs=4, help=argparse.SUPPRESS)  # a rival's own process
    options = parser.parse_args()
    if options.pool:
        pool_loop(*options.pool)
        return
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        size = write_corpus(corpus, options.megabytes * 1_000_000)
        print(f"{size / 1e6:.0f} MB of text, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        if options.memory:
            model = train_model(options.libraries[0], corpus, Path(folder))
            samples = measure_memory(corpus, Path(folder), options.libraries[0], model)
            if options.csv:
                write_samples(samples, options.csv)
            if options.plot:
                draw_samples(samples, size, options.plot)
            return
        print(f"{'library':<14}{'bare':>12}{'megalite':>12}{'pool':>12}   MB/s, medians")
        for library in options.libraries:
            model = train_model(library, corpus, Path(folder))
            report(library, model, corpus, Path(folder), size, options.rounds)


def report(library: str, model: Path, corpus: Path, folder: Path, size: int, rounds: int) -> None:
    """One line of the table, and the two ratios of paired rounds."""
    rivals: dict[str, Callable[[], Seconds]] = {
        "bare": lambda: bare_seconds(library, model, corpus),
        "megalite": lambda: command_seconds(ours(library, model, corpus, folder / "ours")),
        "pool": lambda: command_seconds(
            [sys.executable, __file__, "--pool", library, model, corpus, folder / "pool"]
        ),
    }
    times: dict[str, list[Seconds]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, measure in rivals.items():
            times[name].append(measure())
    for suffix in ("bin", "idx"):
        found = (folder / f"ours_text_document.{suffix}").read_bytes()
        assert found == (folder / f"pool.{suffix}").read_bytes(), "the rivals' outputs differ"
    for which, kind in enumerate(("wall time", "CPU time")):
        # MB/s of WORKERS cores: with nothing else to do on them both kinds say the same.
        cores = (1, WORKERS)[which]
        figures = {name: [pair[which] / cores for pair in each] for name, each in times.items()}
        speeds = {name: size / 1e6 / statistics.median(each) for name, each in figures.items()}
        print(f"{library:<14}" + "".join(f"{speeds[name]:12.2f}" for name in rivals), f"  {kind}")
        for name, goal in (("bare", 0.85), ("pool", 1.5)):
            ratios = [a / b for a, b in zip(figures[name], figures["megalite"], strict=True)]
            print(
                f"  megalite / {name}: {statistics.median(ratios):.2f} (goal {goal}; rounds "
                f"{', '.join(f'{ratio:.2f}' for ratio in ratios)})",
                flush=True,
            )


# Text and tokenizers


def write_corpus(path: Path, wanted_bytes: int) -> int:
    """JSON lines of random documents of 100 bytes to 30 KB; returns the bytes of text."""
    draw = random.Random(1)
    letters = "etaoinshrdlucmfwypvbgkqjxz"
    words = ["naïve", "日本語", "Привет", "🎉", "3.14", "x_i", "\n\n"]
    for _ in range(20_000):
        letters_of_word = draw.choices(letters, range(26, 0, -1), k=draw.randint(1, 10))
        words.append("".join(letters_of_word))
    weights = np.cumsum([1 / rank for rank in range(1, len(words) + 1)]).tolist()
    draw.shuffle(words)
    total = 0
    with open(path, "w", encoding="utf-8") as file:
        while total < wanted_bytes:
            count = int(20 * 300 ** draw.random())
            text = " ".join(draw.choices(words, cum_weights=weights, k=count))
            file.write(json.dumps({"id": total, "text": text}, ensure_ascii=False) + "\n")
            total += len(text.encode())
    return total


def texts(corpus: Path) -> Iterator[str]:
    """The documents."""
    with open(corpus, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def train_model(library: str, corpus: Path, folder: Path) -> Path:
    """A tokenizer of 8000 tokens, trained on the corpus' first 3 MB."""
    sample, total = [], 0
    for text in texts(corpus):
        sample.append(text[:4000])
        total += len(sample[-1])
        if total > 3_000_000:
            break
    path = folder / f"{library}.model"
    if library == "sentencepiece":
        import sentencepiece

        with open(path, "wb") as model:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sample), model_writer=model, vocab_size=8000,
                model_type="bpe", byte_fallback=True, max_sentence_length=100_000,
                minloglevel=2,
            )  # fmt: skip
        return path
    import tokenizers

    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(sample, vocab_size=8000, show_progress=False)
    byte_of = {char: byte for byte, char in enumerate(_byte_letters())}
    lines = [
        base64.b64encode(bytes(byte_of[char] for char in token)) + f" {rank}\n".encode()
        for token, rank in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    ]
    path.write_bytes(b"".join(lines))
    return path


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in GPT-2's vocabularies."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = (byte for byte in range(256) if byte not in shown)
    letters = {byte: chr(byte) for byte in shown}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]


Encode = Callable[[str], Sequence[int]]


def library_tokenizer(library: str, model: Path) -> tuple[Encode, Encode, int]:
    """The library's fastest function from a text to ids, Megatron-LM's, the end-of-document id."""
    if library == "sentencepiece":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        return processor.encode, processor.encode_as_ids, processor.eos_id()
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(model))
    named = ["<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>"]
    named += [f"<SPECIAL_{i}>" for i in range(len(named), SPECIAL_TOKENS)]
    pattern = (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
        r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokens = {token: rank + SPECIAL_TOKENS for token, rank in ranks.items()}
    specials = {name: i for i, name in enumerate(named)}
    encoding = tiktoken.Encoding(
        "megatron", pat_str=pattern, mergeable_ranks=tokens, special_tokens=specials
    )
    # With one special token instead of a thousand, none of which is looked for.
    fastest = tiktoken.Encoding(
        "bare", pat_str=pattern, mergeable_ranks=tokens, special_tokens={"</s>": 2}
    )

    def encode_as_megatron(text: str) -> list[int]:
        return encoding.encode(text, allowed_special="all")

    bare = partial(fastest.encode_to_numpy, disallowed_special=())
    return bare, encode_as_megatron, named.index("</s>")


def ours(library: str, model: Path, corpus: Path, prefix: Path) -> list[Any]:
    """Our command."""
    kind = ["GPTSentencePieceTokenizer"]
    if library == "tiktoken":
        kind = ["TikTokenizer", "--tiktoken-pattern", "v2"]
    return [
        sys.executable, TOOL, "--input", corpus, "--output-prefix", prefix, "--workers", WORKERS,
        "--append-eod", "--tokenizer-type", *kind, "--tokenizer-model", model,
    ]  # fmt: skip


# The rivals


Seconds = tuple[float, float]
"""Wall time, and CPU time of all processes together."""


def command_seconds(command: list[Any]) -> Seconds:
    """Of a whole command."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu


def bare_seconds(library: str, model: Path, corpus: Path) -> Seconds:
    """What two processes need at once to encode half of the texts each."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(WORKERS), context.SimpleQueue()
    processes = [
        context.Process(target=_encode_share, args=(library, model, corpus, i, barrier, results))
        for i in range(WORKERS)
    ]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return max(wall for wall, _ in found), sum(cpu for _, cpu in found)


def _encode_share(
    library: str, model: Path, corpus: Path, share: int, barrier: Any, results: Any
) -> None:
    encode = library_tokenizer(library, model)[0]
    mine = [text for i, text in enumerate(texts(corpus)) if i % WORKERS == share]
    barrier.wait()
    begin, cpu = time.perf_counter(), time.process_time()
    for text in mine:
        encode(text)
    results.put((time.perf_counter() - begin, time.process_time() - cpu))


class _Encoder:
    """What each process of the pool holds."""

    encode: Encode
    eod: int

    @classmethod
    def start(cls, library: str, model: str) -> None:
        _, cls.encode, cls.eod = library_tokenizer(library, Path(model))

    @classmethod
    def line(cls, line: str) -> tuple[dict[str, list[int]], dict[str, list[int]], int]:
        ids = list(cls.encode(json.loads(line)["text"]))
        lengths = [len(ids)] if ids else []
        if ids:
            ids.append(cls.eod)
            lengths[-1] += 1
        return {"text": ids}, {"text": lengths}, len(line)


def pool_loop(library: str, model: str, corpus: str, prefix: str) -> None:
    """Lines through a pool, 32 at a time, documents appended one by one in this process."""
    lengths, documents = array("i"), array("q", [0])
    with (
        multiprocessing.Pool(WORKERS, _Encoder.start, (library, model)) as pool,
        open(corpus, encoding="utf-8") as file,
        open(f"{prefix}.bin", "wb") as tokens,
    ):
        for ids, sizes_of_parts, _ in pool.imap(_Encoder.line, file, 32):
            tokens.write(np.array(ids["text"], dtype=np.uint16).tobytes(order="C"))
            lengths.extend(sizes_of_parts["text"])
            documents.append(len(lengths))
    sizes = np.array(lengths, "<i4")
    starts = np.cumsum(sizes.astype("<i8") * 2) - sizes * 2
    with open(f"{prefix}.idx", "wb") as index:
        index.write(b"MMIDIDX\0\0" + np.array([1], "<u8").tobytes() + b"\x08")
        index.write(np.array([len(lengths), len(documents)], "<u8").tobytes())
        index.write(sizes.tobytes() + starts.astype("<i8").tobytes())
        index.write(np.array(documents, "<i8").tobytes())


# Memory


WORKER_LIMIT_MB = 600
"""What a worker may need on any corpus."""

Samples = list[tuple[float, float, float]]
"""Seconds, and the resident memory [MB] of the parent and of the largest worker."""


def measure_memory(corpus: Path, folder: Path, library: str, model: Path) -> Samples:
    """Sample the resident memory of all processes of one run."""
    command = [str(word) for word in ours(library, model, corpus, folder / "ours")]
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    samples: Samples = []
    while process.poll() is None:
        children = _children(process.pid)
        parent = _resident(process.pid)
        largest = max(map(_resident, children), default=0.0)
        samples.append((time.perf_counter() - begin, parent, largest))
        time.sleep(SAMPLE_SECONDS)
    assert process.returncode == 0
    print(f"{samples[-1][0]:.0f} s with {library}, --workers {WORKERS}; resident MB over time")
    for name, column in (("parent", 1), ("largest worker", 2)):
        values = [sample[column] for sample in samples]
        half = max(values[: len(values) // 2])
        print(f"{name}: peak of the first half {half:.0f} MB, of all {max(values):.0f} MB")
    return samples


def write_samples(samples: Samples, path: Path) -> None:
    """As a table."""
    rows = [f"{at:.1f},{parent:.1f},{worker:.1f}" for at, parent, worker in samples]
    path.write_text("\n".join(["seconds,parent_mb,largest_worker_mb", *rows]) + "\n")


def draw_samples(samples: Samples, size: int, path: Path) -> None:
    """As a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    seconds, parent, worker = zip(*samples, strict=True)
    axes.plot(seconds, parent, label="parent")
    axes.plot(seconds, worker, label="largest worker")
    axes.axhline(WORKER_LIMIT_MB, color="gray", linestyle=":", label="a worker's limit")
    axes.set(
        title=f"preprocess_data.py, {size / 1e9:.1f} GB of text, --workers {WORKERS}",
        xlabel="seconds",
        ylabel="resident memory [MB]",
        ylim=(0, WORKER_LIMIT_MB * 1.1),
    )
    axes.legend(loc="center right")
    figure.savefig(path)


def _children(pid: int) -> list[int]:
    try:
        words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [int(word) for word in words]


def _resident(pid: int) -> float:
    """Resident memory of a process [MB]; 0 of one that has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    main()
