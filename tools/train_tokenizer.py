"""Train a SentencePiece tokenizer on text.

python tools/train_tokenizer.py --input a.txt b.jsonl --output my.model --vocab-size 32000
python -m megalite.pretrain --tokenizer-type Llama2Tokenizer --tokenizer-model my.model --data a.txt

Spaces are kept as they are and any text has tokens: characters outside the vocabulary become bytes
(unless --no-byte-fallback). So decoding gives the text back, as with LLaMA 2's tokenizer.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megalite.errors import ConfigError, DataError
from megalite.program import end
from megalite.tokenizer.sentencepiece import SentencePieceTokenizer
from megalite.tokenizer.text import well_formed

LONGEST_LINE_BYTES = 4192
"""SentencePiece passes over longer lines: they are cut."""

LEAST_COVERAGE = 0.98
"""SentencePiece takes no less."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 2 bad input."""
    options = _parser().parse_args(argv)
    try:
        _check(options)
        lines = _Lines(options.input, options.json_key)
        model = _train(options, lines)
        _write(Path(options.output), model)
        print(_summary(Path(options.output), lines))
    except ConfigError as error:
        print(error.message(), file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_tokenizer.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help=".txt or .jsonl files")
    add("--output", required=True, metavar="FILE", help="the .model file to write")
    add("--json-key", default="text", metavar="KEY", help="field of a .jsonl line (text)")
    add("--type", default="bpe", choices=("bpe", "unigram"), help="kind of model (bpe)")
    add("--vocab-size", type=int, default=32000, metavar="TOKENS", help="all tokens (32000)")
    add(
        "--character-coverage",
        type=float,
        default=0.9995,
        metavar="SHARE",
        help="share of the text whose characters get tokens of their own (0.9995)",
    )
    add(
        "--byte-fallback",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="other characters become bytes, not <unk> (on)",
    )
    add(
        "--split-digits",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="every digit is a token of its own (on)",
    )
    add("--user-symbols", nargs="*", default=[], metavar="TEXT", help="always tokens, never split")
    add(
        "--max-lines",
        type=int,
        default=0,
        metavar="LINES",
        help="train on so many lines, drawn from all (0: on all)",
    )
    add("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="of unigram models")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Everything that can be seen before the text is read.

    Raises:
        ConfigError: all that is wrong.
    """
    problems = []
    for name in options.input:
        path = Path(name)
        if path.suffix not in (".txt", ".jsonl"):
            problems.append(f"--input {name}: expected a .txt or .jsonl file")
        elif not path.is_file():
            problems.append(f"--input {name}: there is no such file")
    if not options.output.endswith(".model"):
        problems.append(f"--output {options.output}: the name must end with .model")
    if Path(options.output).exists():
        problems.append(f"--output {options.output} exists; choose another name or remove it")
    elif not Path(options.output).absolute().parent.is_dir():
        problems.append(f"--output {options.output}: there is no such folder")
    if options.vocab_size < 1:
        problems.append(f"--vocab-size {options.vocab_size} must be above 0")
    if not LEAST_COVERAGE <= options.character_coverage <= 1:
        problems.append(
            f"--character-coverage {options.character_coverage} must be from {LEAST_COVERAGE} to 1"
        )
    if options.threads < 1:
        problems.append(f"--threads {options.threads} must be above 0")
    if options.max_lines < 0:
        problems.append(f"--max-lines {options.max_lines} must not be negative")
    symbols = options.user_symbols
    problems += [
        f"--user-symbols {symbol!r} must be there once, not empty, and not one of <unk>, <s>, "
        "</s>, which every model has"
        for symbol in dict.fromkeys(symbols)
        if not symbol or symbol in ("<unk>", "<s>", "</s>") or symbols.count(symbol) > 1
    ]
    if problems:
        raise ConfigError(problems)


class _Lines:
    """Lines of all files, none longer than SentencePiece takes; what fails is kept for later,
    since an error within the library's training would lose its message.

    Attributes:
        error: what was wrong with a file, if anything was.
        count, size_bytes: of the lines so far.
    """

    def __init__(self, paths: Sequence[str], key: str):
        self._paths, self._key = paths, key
        self.error: ConfigError | None = None
        self.count = self.size_bytes = 0

    def __iter__(self) -> Iterator[str]:
        try:
            for name in self._paths:
                for line in self._file(Path(name)):
                    yield from self._pieces(line)
        except OSError as error:
            self.error = DataError(f"{error.filename or name} cannot be read: {error.strerror}")
        except ConfigError as error:
            self.error = error

    def _file(self, path: Path) -> Iterator[str]:
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                if path.suffix == ".txt":
                    yield line.rstrip("\n")
                elif line.strip():
                    yield from self._text(path, number, line).splitlines()

    def _text(self, path: Path, number: int, line: str) -> str:
        try:
            text = json.loads(line)[self._key]
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: line {number} is not JSON: {error}") from None
        except (KeyError, TypeError, IndexError):
            raise DataError(f"{path}: line {number} has no field {self._key!r}") from None
        if not isinstance(text, str):
            raise DataError(f"{path}: line {number}: {self._key!r} is not a string")
        return well_formed(text)

    def _pieces(self, line: str) -> Iterator[str]:
        # The null character ends a string in the library's trainer.
        line = line.replace("\0", " ")
        if not line.strip():
            return
        characters = LONGEST_LINE_BYTES // 4  # of four bytes at most
        for start in range(0, len(line), characters):
            piece = line[start : start + characters]
            self.count += 1
            self.size_bytes += len(piece.encode())
            yield piece


def _train(options: argparse.Namespace, lines: _Lines) -> bytes:
    """The model file's content.

    Raises:
        ConfigError: the text is unreadable, empty, or does not fit the vocabulary.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=options.type,
            vocab_size=options.vocab_size,
            character_coverage=options.character_coverage,
            byte_fallback=options.byte_fallback,
            split_digits=options.split_digits,
            user_defined_symbols=options.user_symbols,
            input_sentence_size=options.max_lines,
            shuffle_input_sentence=bool(options.max_lines),
            num_threads=options.threads,
            # Decoding gives the text back: nothing is normalized, no space is dropped.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            train_extremely_large_corpus=True,
            minloglevel=2,
        )
    except RuntimeError as error:
        if lines.error is None:
            raise ConfigError(_explain(str(error), options, lines)) from None
    if lines.error is not None:
        raise lines.error
    return model.getvalue()


def _explain(message: str, options: argparse.Namespace, lines: _Lines) -> str:
    """The library's message in the words of the flags."""
    if not lines.count:
        return f"--input {' '.join(options.input)} holds no text"
    size = f"--vocab-size {options.vocab_size}"
    if found := re.search(r"too high .*<= (\d+)", message):
        return f"{size} is more than this text gives: the most is {found[1]}; or give more text"
    if found := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return (
            f"{size} has no room for the characters, bytes and symbols alone: give more than "
            f"{found[1]}, or a lower --character-coverage"
        )
    return f"SentencePiece could not train: {message}"


def _write(path: Path, model: bytes) -> None:
    """Under its final name only when it is complete."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_bytes(model)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"--output {path} cannot be written: {error.strerror}") from None


def _summary(path: Path, lines: _Lines) -> str:
    tokenizer = SentencePieceTokenizer(str(path), bos=False)
    return (
        f"{path}: {tokenizer.vocab_size:,} tokens, from {lines.count:,} lines "
        f"({lines.size_bytes:,} bytes)\n"
        f"next: python -m megalite.pretrain --tokenizer-type Llama2Tokenizer "
        f"--tokenizer-model {path} --data my.txt"
    )


if __name__ == "__main__":
    end(main)
