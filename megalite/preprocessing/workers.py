"""Chunks encoded by several processes at once, handed on in their order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait

from megalite.errors import DataError
from megalite.preprocessing.encode import Encoding, Result, encode_chunk
from megalite.reading.chunks import Chunk

_CHUNKS_PER_WORKER = 4
"""On their way at once, so that a slow one does not make the other workers wait. It bounds the
memory: what is read and not yet written is these chunks."""


def encode_in_order(
    encoding: Encoding, chunks: Iterable[Chunk], workers: int
) -> Generator[tuple[Chunk, Result], None, None]:
    """Each chunk with its result, in the order of the chunks.

    Processes are spawned, not forked: they inherit neither threads nor files, and are the same on
    every system.

    Raises:
        DataError: a worker was killed.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_end_with_parent)
    waiting: deque[tuple[Chunk, Future[Result]]] = deque()
    try:
        for chunk in chunks:
            with _interrupt_held_back():
                waiting.append((chunk, pool.submit(encode_chunk, encoding, chunk)))
            while waiting and (
                len(waiting) >= _CHUNKS_PER_WORKER * workers or waiting[0][1].done()
            ):
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool:
        raise DataError(
            "a worker was killed, probably because the machine has no memory left: use fewer "
            "--workers or a smaller --max-document-mb, and continue with --resume"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupt_held_back() -> Iterator[None]:
    """Ctrl-C waits meanwhile, and processes started meanwhile never get it: their parent does."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """In a worker: a parent that was killed would leave it waiting for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
