"""Train a SentencePiece tokenizer on text.

python tools/train_tokenizer.py --input a.txt b.jsonl --output my.model --vocab-size 32000
python -m megalite.pretrain --tokenizer-type Llama2Tokenizer --tokenizer-model my.model --data a.txt

Spaces are kept as they are and any text has tokens: characters outside the vocabulary become bytes
(unless --no-byte-fallback). So decoding gives the text back, as with LLaMA 2's tokenizer.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megalite.errors import ConfigError, DataError
from megalite.preprocessing.flags import Flag, end, read_flags, together
from megalite.preprocessing.reading_flags import READING_FLAGS, reading_problems
from megalite.preprocessing.settings import long_name
from megalite.reading.chunks import Place, chunks
from megalite.reading.inputs import find_inputs
from megalite.reading.records import SHOWN_BAD, left_out, sentences, texts
from megalite.tokenizer.sentencepiece import SentencePieceTokenizer
from megalite.wording import counted

LONGEST_LINE_BYTES = 4192
"""SentencePiece passes over longer lines: they are cut."""

LEAST_COVERAGE = 0.98
"""SentencePiece takes no less."""

LEAST_LINES = 101
"""SentencePiece draws no fewer."""


FLAGS = (
    Flag(
        "--input",
        "Files (.jsonl, .json, .txt, also .gz or .zst, or .parquet), folders, globs, or - for JSON "
        "Lines on standard input.",
        (),
        metavar="PATH",
        required=True,
    ),
    Flag("--output", "The .model file to write.", metavar="FILE", required=True),
    Flag(
        "--json-key",
        "Field of a JSON object, or column of a parquet file, that holds text.",
        "text",
        metavar="KEY",
    ),
    Flag("--type", "Kind of model; LLaMA 2's is bpe.", "bpe", choices=("bpe", "unigram")),
    Flag(
        "--vocab-size",
        "Size of the vocabulary, with special tokens and bytes.",
        32000,
        metavar="TOKENS",
    ),
    Flag(
        "--character-coverage",
        "Share of the text's characters that must be in the vocabulary; the rarest are left to "
        "--byte-fallback.",
        0.9995,
        metavar="SHARE",
    ),
    Flag("--byte-fallback", "Characters outside the vocabulary become bytes, not <unk>.", True),
    Flag("--split-digits", "Every digit is a token of its own.", True),
    Flag(
        "--user-symbols",
        "Texts that are always one token, as <|user|> of a chat format.",
        (),
        metavar="TEXT",
    ),
    Flag("--max-lines", "Train on so many lines, drawn from all; 0: on all.", 0, metavar="LINES"),
    Flag("--threads", "Threads that train a unigram model.", os.cpu_count() or 1),
    *READING_FLAGS,
)


def main(argv: Sequence[str]) -> int:
    """Run the tool; returns its exit code."""
    values, problems = read_flags(argv, FLAGS, prog="train_tokenizer.py", description=__doc__ or "")
    if values["type"] == "bpe":
        problems += values.no_effect("threads", "without --type unigram")
    options = together(problems, lambda: _checked(values))
    lines = _Lines(options)
    model = _train(options, lines)
    _write(options.output, model)
    print(_summary(options.output, lines))
    return 0


def _checked(values: Mapping[str, Any]) -> SimpleNamespace:
    """The flags' values, and the files that they name, checked before any text is read.

    Raises:
        ConfigError: all that is wrong.
    """
    options = SimpleNamespace(**values)
    options.output = Path(options.output)
    options.inputs, problems = find_inputs(options.input)
    if options.output != Path() and options.output.suffix != ".model":
        problems.append(f"--output {options.output}: the name must end with .model")
    if os.path.isfile(options.output):
        problems.append(f"--output {options.output} exists; choose another name or remove it")
    elif not os.path.isdir(options.output.parent):
        problems.append(f"--output {options.output}: there is no such folder")
    elif why := long_name(options.output):
        problems.append(f"--output {options.output}: {why}")
    elif options.output != Path() and options.output.is_dir():
        problems.append(f"--output {options.output} is a folder")
    if options.vocab_size < 1:
        problems.append(f"--vocab-size {options.vocab_size} must be above 0")
    if not LEAST_COVERAGE <= options.character_coverage <= 1:
        problems.append(
            f"--character-coverage {options.character_coverage} must be from {LEAST_COVERAGE} to 1"
        )
    if options.threads < 1:
        problems.append(f"--threads {options.threads} must be above 0")
    if options.max_lines and options.max_lines < LEAST_LINES:
        problems.append(f"--max-lines {options.max_lines} must be 0, or {LEAST_LINES} or more")
    symbols = options.user_symbols
    problems += [
        f"--user-symbols {symbol!r} must be there once, and not one of <unk>, <s>, </s>, which "
        "every model has"
        for symbol in dict.fromkeys(symbols)
        if symbol in ("<unk>", "<s>", "</s>") or symbols.count(symbol) > 1
    ]
    problems += reading_problems(options.max_document_mb)
    if problems:
        raise ConfigError(problems)
    return options


class _Lines:
    """Lines of all files, none longer than SentencePiece takes; what fails is kept for later,
    since an error within the library's training would lose its message.

    Attributes:
        error: what was wrong with a file, if anything was.
        count, size_bytes: of the lines so far.
        left_out: records that could not be used.
        examples: sentences about the first of them.
    """

    def __init__(self, options: SimpleNamespace):
        self._options = options
        self.error: DataError | None = None
        self.count = self.size_bytes = self.left_out = 0
        self.examples: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._texts():
                for line in text.splitlines():
                    yield from self._pieces(line)
        except DataError as error:
            self.error = error

    def _texts(self) -> Iterator[str]:
        options = self._options
        keys, limit = (options.json_key,), options.max_document_mb << 20
        for chunk in chunks(options.inputs, keys, "line", limit, Place()):
            good, bad = texts(chunk, keys, limit)
            told = sentences(bad, options.inputs)
            if bad and options.strict:
                raise DataError([f"--strict: {each}" for each in told])
            self.left_out += sum(each.count for each in bad)
            self.examples = (self.examples + told)[:SHOWN_BAD]
            for (text,) in good:
                yield text

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


def _train(options: SimpleNamespace, lines: _Lines) -> bytes:
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
            user_defined_symbols=list(options.user_symbols),
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
            why = _explain(str(error), options, lines)
            raise ConfigError([why, *lines.examples]) from None
    if lines.error is not None:
        raise lines.error
    return model.getvalue()


def _explain(message: str, options: SimpleNamespace, lines: _Lines) -> str:
    """The library's message in the words of the flags."""
    if not lines.count:
        return "the inputs hold no text"
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
    temporary = path.with_name(f".megalite.tmp-{os.getpid()}")  # no longer than any name
    try:
        temporary.write_bytes(model)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"--output {path} cannot be written: {error.strerror}") from None


def _summary(path: Path, lines: _Lines) -> str:
    tokenizer = SentencePieceTokenizer(str(path), bos=False)
    return "\n".join(
        [
            f"{path}: {counted(tokenizer.vocab_size, 'token')}, from "
            f"{counted(lines.count, 'line')} ({counted(lines.size_bytes, 'byte')})",
            *left_out(lines.left_out, lines.examples),
            "next: python -m megalite.pretrain --tokenizer-type Llama2Tokenizer "
            f"--tokenizer-model {path} --data my.txt",
        ]
    )


if __name__ == "__main__":
    end(main)
