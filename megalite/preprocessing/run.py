"""Text into indexed datasets: read, encode in worker processes, write in order.

Whatever happens, a dataset appears under its name only when it is complete, and an interrupted run
goes on where it was (`journal`). The output depends on inputs, tokenizer and settings, not on the
number of workers nor on interruptions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from megalite.data.indexed_format import token_dtype
from megalite.data.indexed_writer import FileSum, IndexedWriter, Written
from megalite.data.sidecar import Sidecar, SourceFile, read_sidecar, sidecar_path
from megalite.errors import ConfigError, DataError
from megalite.preprocessing.encode import Encoding, Result
from megalite.preprocessing.journal import Counts, Journal, State, identity
from megalite.preprocessing.reading_flags import longer_documents
from megalite.preprocessing.settings import SUFFIXES, Settings, problems
from megalite.preprocessing.workers import encode_in_order
from megalite.reading.chunks import Bad, Chunk, NoLinesError, Place, chunks, too_long
from megalite.reading.inputs import STANDARD_INPUT, Input, find_inputs
from megalite.reading.records import SHOWN_BAD, left_out, sentences
from megalite.tokenizer.base import Tokenizer
from megalite.tokenizer.choose import open_tokenizer


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        documents: written, of each key.
        tokens, text_bytes: written, of all keys together.
        read_bytes, total_bytes: of the input files, as they lie on the disk; 0 if unknown.
        left_out: records.
    """

    documents: int
    tokens: int
    text_bytes: int
    read_bytes: int
    total_bytes: int
    left_out: int


@dataclass(frozen=True)
class Report:
    """What a run has made.

    Attributes:
        datasets: by their prefixes.
        left_out: records that could not be used.
        examples: sentences about the first of them.
    """

    datasets: dict[Path, Sidecar]
    left_out: int
    examples: tuple[str, ...]


def prepare(settings: Settings) -> Job:
    """Find everything that a run needs; nothing is written yet.

    Raises:
        ConfigError: all that is wrong with settings and files.
    """
    inputs, wrong = find_inputs(settings.inputs)
    wrong += problems(settings, inputs)
    try:
        tokenizer = open_tokenizer(settings.tokenizer, settings.vocab_size)
    except ConfigError as error:
        wrong += error.violations
    if wrong:
        raise ConfigError(wrong)
    return Job(settings, inputs, tokenizer)


class Job:
    """A run whose settings are right."""

    def __init__(self, settings: Settings, inputs: Sequence[Input], tokenizer: Tokenizer):
        self._settings, self._inputs, self._tokenizer = settings, inputs, tokenizer
        self._limit = settings.longest_mb << 20
        self._total_bytes = sum(each.size for each in inputs)
        if any(each.path == STANDARD_INPUT for each in inputs):
            self._total_bytes = 0
        self._identity = identity(settings, tokenizer.fingerprint, inputs)

    def run(self, show: Callable[[Progress], None]) -> Report:
        """Do it.

        Args:
            show: called at the start and after every chunk.

        Raises:
            DataError: the disk is full, the inputs hold no document, or with `strict` a record
                cannot be used: nothing is left behind. A file can no longer be read, or a worker
                was killed: `resume` goes on.
            KeyboardInterrupt: Ctrl-C, or what SIGTERM raises; the message says how to go on.
        """
        settings = self._settings
        journal = Journal(settings.output_prefix, settings.resume)
        try:
            state = journal.read(self._identity) if settings.resume else None
            if state is None or not state.sealed:
                state = self._write(journal, state, show)
            return self._publish(journal, state)
        except KeyboardInterrupt as stopped:
            raise type(stopped)(
                f"stopped; what is done is in {journal.folder}, and the same command with --resume "
                "goes on"
            ) from None
        finally:
            journal.release()

    def _write(
        self, journal: Journal, state: State | None, show: Callable[[Progress], None]
    ) -> State:
        """Encode everything behind the state and complete the files under temporary names."""
        keys = self._settings.json_keys
        if state is None:
            state = State(self._identity, Place(), (None,) * len(keys), (Counts(),) * len(keys))
        dtype = token_dtype(self._tokenizer.vocab_size)
        writers: list[IndexedWriter] = []
        try:
            with journal.must_be_whole():
                for key, written in zip(keys, state.written, strict=True):
                    prefix = self._settings.prefix(key)
                    writers.append(IndexedWriter(prefix, dtype, journal.temporary(key), written))
            state = self._encode(journal, state, writers, show)
            return self._seal(journal, state, writers)
        except OSError as error:
            journal.remove()
            raise DataError(
                f"{journal.folder}: {error.strerror}; what was unfinished is removed, and nothing "
                "else was changed. Give another --output-prefix, or make room"
            ) from None
        finally:
            for writer in writers:
                writer.release()

    def _publish(self, journal: Journal, state: State) -> Report:
        """Give all files their names.

        Raises:
            DataError: one cannot have its name; `resume` goes on.
        """
        try:
            self._name_files(journal)
        except OSError as error:
            raise DataError(
                f"{error.filename2 or error.filename or journal.folder}: {error.strerror}; all is "
                f"encoded and in {journal.folder}: when there is room for it, the same command "
                "with --resume goes on"
            ) from None
        journal.remove()
        prefixes = [self._settings.prefix(key) for key in self._settings.json_keys]
        sidecars = {prefix: read_sidecar(prefix) for prefix in prefixes}
        return Report(
            datasets={prefix: sidecar for prefix, sidecar in sidecars.items() if sidecar},
            left_out=state.bad_count,
            examples=self._sentences(state.bad),
        )

    def _name_files(self, journal: Journal) -> None:
        for key in self._settings.json_keys:
            for suffix in SUFFIXES:
                path = Path(f"{journal.temporary(key)}.{suffix}")
                if path.exists():  # an earlier run may have come as far as this
                    _to_disk(path)
                    os.replace(path, f"{self._settings.prefix(key)}.{suffix}")

    def _encode(
        self,
        journal: Journal,
        state: State,
        writers: Sequence[IndexedWriter],
        show: Callable[[Progress], None],
    ) -> State:
        settings = self._settings
        encoding = Encoding(
            settings.tokenizer,
            settings.vocab_size,
            settings.json_keys,
            settings.append_eod,
            self._limit,
        )
        found = self._chunks(journal, state.place)
        results = encode_in_order(encoding, self._inputs, found, settings.workers)
        show(self._progress(state))
        with closing(results):
            for chunk, result in results:
                if settings.strict and result.bad_count:
                    journal.remove()
                    raise DataError([f"--strict: {s}" for s in self._sentences(result.bad)])
                state = _add(state, writers, chunk, result)
                journal.keep(state)
                show(self._progress(state))
        if not _written(state, 0).documents:
            journal.remove()
            bad = left_out(state.bad_count, self._sentences(state.bad))
            raise DataError("\n".join(["the inputs hold no document", *bad]))
        return state

    def _chunks(self, journal: Journal, start: Place) -> Iterator[Chunk]:
        settings = self._settings
        try:
            yield from chunks(
                self._inputs, settings.json_keys, settings.text_documents, self._limit, start
            )
        except NoLinesError:
            journal.remove()
            raise
        except DataError as error:
            (why,) = error.violations
            raise DataError(f"{why}; when it can, the same command with --resume goes on") from None

    def _sentences(self, bad: Sequence[Bad]) -> tuple[str, ...]:
        """About records left out; of one that is too long also how to have it encoded."""
        advice = longer_documents(self._settings.tokenizer.tokenizer)
        too = too_long(self._limit)
        return tuple(
            f"{sentence}; {advice}" if advice and each.why.startswith(too) else sentence
            for each, sentence in zip(bad, sentences(bad, self._inputs), strict=False)
        )

    def _progress(self, state: State) -> Progress:
        return Progress(
            documents=_written(state, 0).documents,
            tokens=sum(each.tokens for each in state.written if each),
            text_bytes=sum(each.text_bytes for each in state.counts),
            read_bytes=state.read_bytes,
            total_bytes=self._total_bytes,
            left_out=state.bad_count,
        )

    def _seal(self, journal: Journal, state: State, writers: Sequence[IndexedWriter]) -> State:
        for i, writer in enumerate(writers):
            sums = writer.seal()
            sidecar = self._sidecar(_written(state, i), state.counts[i], state.bad_count, sums)
            sidecar.write(sidecar_path(journal.temporary(self._settings.json_keys[i])))
        state = replace(state, sealed=True)
        journal.keep(state)
        return state

    def _sidecar(
        self, written: Written, counts: Counts, left_out: int, sums: Mapping[str, FileSum]
    ) -> Sidecar:
        tokenizer = self._tokenizer
        return Sidecar(
            tokenizer_type=self._settings.tokenizer.tokenizer,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
            append_eod=self._settings.append_eod,
            documents=written.documents,
            sequences=written.sequences,
            tokens=written.tokens,
            text_bytes=counts.text_bytes,
            max_token=counts.max_token,
            left_out=left_out,
            bin=sums["bin"],
            idx=sums["idx"],
            sources=tuple(SourceFile(each.path, each.size) for each in self._inputs),
        )


def _add(state: State, writers: Sequence[IndexedWriter], chunk: Chunk, result: Result) -> State:
    """Write a chunk's documents; the state behind it."""
    for writer, encoded in zip(writers, result.datasets, strict=True):
        writer.add_documents(encoded.tokens, encoded.lengths, encoded.sequences)
    return replace(
        state,
        place=chunk.after,
        written=tuple(writer.flush() for writer in writers),
        counts=tuple(
            Counts(old.text_bytes + new.text_bytes, max(old.max_token, new.max_token))
            for old, new in zip(state.counts, result.datasets, strict=True)
        ),
        bad=(state.bad + result.bad)[:SHOWN_BAD],
        bad_count=state.bad_count + result.bad_count,
        read_bytes=chunk.read_bytes,
    )


def _written(state: State, i: int) -> Written:
    return state.written[i] or Written(0, 0, 0, "")


def _to_disk(path: Path) -> None:
    """Have a file's content outlive a power failure before its name does."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
