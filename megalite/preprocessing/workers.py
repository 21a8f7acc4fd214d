"""Chunks encoded by several processes at once, handed on in their order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import wait

from megalite.errors import DataError
from megalite.preprocessing.allocation import keep_freed_memory
from megalite.preprocessing.encode import Encoding, Result, encode_chunk
from megalite.reading.chunks import Chunk, Lines, Rows
from megalite.reading.inputs import Input

_CHUNKS_PER_WORKER = 4
"""On their way at once, so that a slow one does not make the other workers wait. It bounds the
memory: what is read and not yet written is these chunks."""


_POLL_SECONDS = 0.1
"""So soon Ctrl-C and SIGTERM are heard."""

_SIGTERM_SECONDS = 5
"""So long a worker goes on that gets a SIGTERM."""


@dataclass(frozen=True)
class _Stretch:
    """So many bytes of a file, from a place on."""

    path: str
    at: int
    size: int

    def read(self) -> bytes:
        """The bytes.

        Raises:
            OSError: they cannot be read, or are not there any more.
        """
        with open(self.path, "rb") as file:
            file.seek(self.at)
            content = file.read(self.size)
        if len(content) < self.size:
            raise OSError(0, "it has become shorter meanwhile", self.path)
        return content


@dataclass(frozen=True)
class _Sent:
    """A chunk on its way to a worker, which reads again what stands in a plain file.

    That is a copy in memory, of what the parent has just read. Through a pipe the same bytes are
    copied six times, and with tiktoken that was 3% of all work.

    Attributes:
        chunk: without those parts' content.
        stretches: of each part, where its content is; None: it is in the chunk.
    """

    chunk: Chunk
    stretches: tuple[_Stretch | None, ...]

    def received(self) -> Chunk:
        """The chunk with all contents; OSError as of `_Stretch.read`."""
        parts = (
            replace(part, content=stretch.read()) if stretch and isinstance(part, Lines) else part
            for part, stretch in zip(self.chunk.parts, self.stretches, strict=True)
        )
        return replace(self.chunk, parts=tuple(parts))


def _sent(chunk: Chunk, inputs: Sequence[Input]) -> _Sent:
    parts: list[Lines | Rows] = []
    stretches: list[_Stretch | None] = []
    for part in chunk.parts:
        if isinstance(part, Lines) and part.at is not None:
            stretches.append(_Stretch(inputs[part.input].path, part.at, len(part.content)))
            part = replace(part, content=b"")
        else:
            stretches.append(None)
        parts.append(part)
    return _Sent(replace(chunk, parts=tuple(parts)), tuple(stretches))


def _encode(encoding: Encoding, sent: _Sent) -> Result:
    """In a worker."""
    return encode_chunk(encoding, sent.received())


def _done(future: Future[Result], *, wanted: bool) -> bool:
    """Whether there is a result; if it is wanted, when there is.

    An interrupt that came while a future is asked would leave it locked, and the pool could not be
    shut down.
    """
    while True:
        with _interrupt_held_back():
            done = bool(wait_for([future], _POLL_SECONDS if wanted else 0).done)
        if done or not wanted:
            return done


def _result(future: Future[Result]) -> Result:
    """Of a future that is done."""
    try:
        with _interrupt_held_back():
            return future.result()
    except OSError as error:
        raise DataError(
            f"{error.filename} cannot be read: {error.strerror}; when it can, the same command "
            "with --resume goes on"
        ) from None


def encode_in_order(
    encoding: Encoding, inputs: Sequence[Input], chunks: Iterable[Chunk], workers: int
) -> Generator[tuple[Chunk, Result], None, None]:
    """Each chunk of the inputs with its result, in the order of the chunks. What a worker can read
    itself is not in the chunk any more.

    Processes are spawned, not forked: they inherit neither threads nor files, and are the same on
    every system.

    Raises:
        DataError: a worker was killed, or an input cannot be read any more.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start)
    waiting: deque[tuple[Chunk, Future[Result]]] = deque()
    most = _CHUNKS_PER_WORKER * workers
    try:
        for chunk in chunks:
            sent = _sent(chunk, inputs)
            with _interrupt_held_back():
                waiting.append((sent.chunk, pool.submit(_encode, encoding, sent)))
            while waiting and _done(waiting[0][1], wanted=len(waiting) >= most):
                first, future = waiting.popleft()
                yield first, _result(future)
        while waiting and _done(waiting[0][1], wanted=True):
            first, future = waiting.popleft()
            yield first, _result(future)
    except BrokenProcessPool:
        raise DataError(
            "a worker was killed, probably because the machine has no memory left: use fewer "
            "--workers or a smaller --max-document-mb, and continue with --resume"
        ) from None
    finally:
        with _interrupt_held_back():
            pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupt_held_back() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait meanwhile, and processes started meanwhile never get them: their
    parent does."""
    held: list[int] = []
    stops = (signal.SIGINT, signal.SIGTERM)
    # The mask is what processes inherit. It is this thread's alone: a thread of numpy's may take
    # the signal, and the handler would run here all the same.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    handlers = {stop: signal.signal(stop, lambda number, _: held.append(number)) for stop in stops}
    try:
        yield
    finally:
        for stop, handler in handlers.items():
            signal.signal(stop, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number in held[:1]:
            signal.raise_signal(number)


def _start() -> None:
    """In a worker, before its first chunk."""
    keep_freed_memory()
    # Slurm sends SIGTERM to all processes. One that ended with half of a result in the pipe would
    # leave its parent reading for ever; the parent, which gets it too, ends all workers in order.
    # But a pool whose one worker was killed has no other way to end the others.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_SIGTERM_SECONDS))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    _end_with_parent()


def _end_with_parent() -> None:
    """A parent that was killed would leave it waiting for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
