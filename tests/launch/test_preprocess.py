"""The tools as people run them: equal output for any number of workers and any interruption; bad
input, a full disk and Ctrl-C end with one message; nothing heavy is imported."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from megalite.data.indexed_reader import IndexedReader
from megalite.data.sidecar import read_sidecar
from megalite.preprocessing.flags import terminate_as_interrupt
from megalite.preprocessing.reading_flags import default_max_document_mb
from megalite.preprocessing.workers import _interrupt_held_back

COUNT = 12_000
"""Documents of the corpus: some 8 chunks of a megabyte."""

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/preprocess_data.py"


def tool(name: str, *argv: object, cwd: Path, given: bytes = b"") -> subprocess.CompletedProcess:
    """Run a tool from another folder than the checkout."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *map(str, argv)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": ":".join(filter(None, paths))},
        input=given,
        capture_output=True,
        timeout=300,
        check=False,
    )


def preprocess(cwd: Path, *argv: object, given: bytes = b"") -> str:
    """Run preprocess_data.py; what it printed."""
    done = tool("preprocess_data.py", *argv, cwd=cwd, given=given)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def refused(cwd: Path, name: str, *argv: object) -> str:
    """Run a tool on bad input; its message."""
    done = tool(name, *argv, cwd=cwd)
    assert done.returncode == 2, done
    message = done.stderr.decode()
    assert message.startswith("megalite: ")
    assert "Traceback" not in message
    return message


def outputs(folder: Path, prefix: str, key: str = "text") -> dict[str, bytes]:
    return {
        suffix: (folder / f"{prefix}_{key}_document.{suffix}").read_bytes()
        for suffix in ("bin", "idx", "json")
    }


def documents(count: int, seed: int = 1) -> list[str]:
    draw = random.Random(seed)
    words = ["the", "of", "naïve", "日本語", "🎉", "tokenizer", "\n", "  "]
    return [" ".join(draw.choices(words, k=draw.choice([0, 1, 20, 300]))) for _ in range(count)]


def write_lines(path: Path, texts: list[str]) -> Path:
    lines = (json.dumps({"text": text, "title": text[:9]}) + "\n" for text in texts)
    path.write_text("".join(lines))
    return path


def make_corpus(folder: Path, count: int) -> Path:
    """a.jsonl in a folder, and its datasets, made by one worker."""
    write_lines(folder / "a.jsonl", documents(count))
    preprocess(folder, "--input", "a.jsonl", "--output-prefix", "one", "--append-eod",
               "--workers", 1)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of several chunks."""
    folder = make_corpus(tmp_path_factory.mktemp("corpus"), COUNT)
    assert (folder / "a.jsonl").stat().st_size > 7 << 20
    return folder


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of so many chunks that a run can be killed often on its way."""
    folder = make_corpus(tmp_path_factory.mktemp("long"), 6 * COUNT)
    assert (folder / "a.jsonl").stat().st_size > 42 << 20
    return folder


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_no_byte(corpus: Path, workers: int) -> None:
    name = f"w{workers}"
    preprocess(corpus, "--input", "a.jsonl", "--output-prefix", name, "--append-eod",
               "--workers", workers)  # fmt: skip
    assert outputs(corpus, name) == outputs(corpus, "one")
    assert not (corpus / f"{name}.partial").exists()


def test_the_output_is_what_megatron_core_builds_from_the_texts(corpus: Path) -> None:
    """Its builder, fed one document after the other by the rules of its preprocess_data.py."""
    pytest.importorskip("megatron.core", reason="no megatron-core", exc_type=ImportError)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{corpus}/theirs.bin", DType.optimal_dtype(257))
    for text in documents(COUNT):
        ids = [*text.encode(), 256] if text else []
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(f"{corpus}/theirs.idx")
    ours = outputs(corpus, "one")
    assert ours["bin"] == (corpus / "theirs.bin").read_bytes()
    assert ours["idx"] == (corpus / "theirs.idx").read_bytes()


def test_the_sidecar_says_what_the_dataset_is(corpus: Path) -> None:
    prefix = corpus / "one_text_document"
    sidecar, reader = read_sidecar(prefix), IndexedReader(prefix)
    assert sidecar is not None
    texts = documents(COUNT)
    assert (sidecar.tokenizer_type, sidecar.tokenizer_fingerprint) == ("ByteTokenizer", "byte-257")
    assert (sidecar.vocab_size, sidecar.eod, sidecar.append_eod) == (257, 256, True)
    assert sidecar.documents == COUNT == len(reader.documents) - 1
    assert sidecar.sequences == sum(map(bool, texts)) == len(reader.lengths)
    assert sidecar.tokens == reader.num_tokens == sidecar.text_bytes + sidecar.sequences
    assert sidecar.text_bytes == sum(len(text.encode()) for text in texts)
    assert sidecar.max_token == int(np.max(reader.tokens))
    for suffix, expected in (("bin", sidecar.bin), ("idx", sidecar.idx)):
        path = f"{prefix}.{suffix}"
        found = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
        assert found.stdout.split()[0] == expected.sha256
        assert Path(path).stat().st_size == expected.bytes
    assert [(each.path, each.bytes) for each in sidecar.sources] == [
        ("a.jsonl", (corpus / "a.jsonl").stat().st_size)
    ]


def test_every_packing_gives_the_same(corpus: Path, tmp_path: Path) -> None:
    """One command: each file has its own dataset as a part, all of them together are the sum."""
    texts = documents(300, seed=2)
    write_lines(tmp_path / "a.jsonl", texts)
    content = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(content))
    inputs: list[object] = ["a.json.gz", "-"]
    if zstandard := pytest.importorskip("zstandard"):
        (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(content))
        inputs.append("a.jsonl.zst")
    if pyarrow := pytest.importorskip("pyarrow"):
        import pyarrow.parquet as parquet

        parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
        inputs.append("a.parquet")
    preprocess(tmp_path, "--input", "a.jsonl", "--output-prefix", "plain")
    preprocess(tmp_path, "--input", *inputs, "--output-prefix", "packed", given=content)
    plain, packed = outputs(tmp_path, "plain"), outputs(tmp_path, "packed")
    assert packed["bin"] == plain["bin"] * len(inputs)
    reader = IndexedReader(tmp_path / "packed_text_document")
    assert len(reader.documents) - 1 == 300 * len(inputs)


def test_keys_are_datasets_of_their_own(tmp_path: Path) -> None:
    texts = documents(50)
    write_lines(tmp_path / "a.jsonl", texts)
    preprocess(tmp_path, "--input", "a.jsonl", "--output-prefix", "o", "--json-keys", "title",
               "text")  # fmt: skip
    assert (
        outputs(tmp_path, "o")["bin"]
        == np.frombuffer("".join(texts).encode(), "u1").astype("<u2").tobytes()
    )
    assert (
        outputs(tmp_path, "o", "title")["bin"]
        == np.frombuffer("".join(text[:9] for text in texts).encode(), "u1").astype("<u2").tobytes()
    )


# Interruptions


def start(folder: Path, *argv: object) -> subprocess.Popen:
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, str(TOOL), *map(str, argv)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": ":".join(filter(None, paths))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def read_bytes(folder: Path, prefix: str) -> int:
    """How far a run has come; 0 before its first chunk."""
    try:
        journal = (folder / f"{prefix}.partial/journal").read_text()
        return int(json.loads(journal)["read_bytes"])
    except (OSError, ValueError):
        return 0


def wait_for_progress(
    folder: Path, prefix: str, process: subprocess.Popen, chunks: int, before: int = 0
) -> None:
    """Until so many chunks are done, after what was done before the process started."""
    seen = {before, 0}
    enough = len(seen) + chunks
    while len(seen) < enough and process.poll() is None:
        seen.add(read_bytes(folder, prefix))
        time.sleep(0.002)


def workers_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in children.read_text().split()]


def gone(pids: list[int], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        alive = [pid for pid in pids if Path(f"/proc/{pid}/cmdline").exists()
                 and Path(f"/proc/{pid}/cmdline").read_bytes()]  # fmt: skip
        if not alive:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("kills", [pytest.param((1, 3), id="twice"),
                                   *(pytest.param((n,) * 3, marks=pytest.mark.full, id=f"full{n}")
                                     for n in range(1, 6))])  # fmt: skip
def test_a_killed_run_goes_on_and_its_output_is_the_same(
    request: pytest.FixtureRequest, tmp_path: Path, kills: tuple[int, ...]
) -> None:
    enough = sum(kills) < 5  # of chunks that the small one has
    corpus = request.getfixturevalue("corpus" if enough else "long_corpus")
    flags = ["--input", corpus / "a.jsonl", "--output-prefix", "k", "--append-eod",
             "--workers", 2]  # fmt: skip
    for number, chunks in enumerate(kills):
        before = read_bytes(tmp_path, "k")
        process = start(tmp_path, *flags, *(["--resume"] if number else []))
        wait_for_progress(tmp_path, "k", process, chunks, before)
        children = workers_of(process.pid)
        process.kill()
        process.communicate()
        assert children
        assert gone(children), "workers outlive their parent"
        assert not list(tmp_path.glob("k_text*")), "nothing appears before it is complete"
    message = refused(tmp_path, "preprocess_data.py", *flags)
    assert "k.partial holds what an interrupted run" in message
    assert "--resume" in message
    other = refused(tmp_path, "preprocess_data.py", *flags, "--resume", "--max-document-mb", 4)
    assert "k.partial had other values of --max-document-mb" in other
    assert read_bytes(tmp_path, "k") > before
    flags[-1] = 3
    preprocess(tmp_path, *flags, "--resume")
    found, expected = outputs(tmp_path, "k"), outputs(corpus, "one")
    assert (found["bin"], found["idx"]) == (expected["bin"], expected["idx"])
    assert not (tmp_path / "k.partial").exists()


def test_a_run_killed_while_names_are_given_goes_on(corpus: Path, tmp_path: Path) -> None:
    """All is written; one file has its name already, the others wait."""
    code = f"""
import os, sys
sys.argv = ["x", "--input", {str(corpus / "a.jsonl")!r}, "--output-prefix", "k", "--append-eod"]
real = os.replace
def replace(a, b):
    real(a, b)
    if str(b).endswith(".bin"):
        os._exit(9)
if __name__ == "__main__":
    os.replace = replace
    import runpy
    runpy.run_path({str(TOOL)!r}, run_name="__main__")
"""
    (tmp_path / "killed.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "killed.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels"},
        check=False,
    )
    assert done.returncode == 9
    assert (tmp_path / "k_text_document.bin").exists()
    assert not (tmp_path / "k_text_document.idx").exists()
    preprocess(tmp_path, "--input", corpus / "a.jsonl", "--output-prefix", "k", "--append-eod",
               "--resume")  # fmt: skip
    found, expected = outputs(tmp_path, "k"), outputs(corpus, "one")
    assert (found["bin"], found["idx"]) == (expected["bin"], expected["idx"])


def test_ctrl_c_ends_with_one_line_and_can_be_resumed(corpus: Path, tmp_path: Path) -> None:
    flags = ["--input", corpus / "a.jsonl", "--output-prefix", "k", "--append-eod"]
    process = start(tmp_path, *flags)
    wait_for_progress(tmp_path, "k", process, 2)
    children = workers_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to all
    message = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130, message
    assert gone(children)
    assert message.strip().splitlines()[-1] == (
        "megalite: stopped; what is done is in k.partial, and the same command with --resume goes "
        "on"
    )
    assert "Traceback" not in message
    preprocess(tmp_path, *flags, "--resume")
    assert outputs(tmp_path, "k")["bin"] == outputs(corpus, "one")["bin"]


@pytest.mark.parametrize("to", ["parent", "all", "a worker first"])
def test_sigterm_ends_as_ctrl_c_does(long_corpus: Path, tmp_path: Path, to: str) -> None:
    """As `kill` sends it to the one process, and Slurm to all of them, in any order."""
    flags = ["--input", long_corpus / "a.jsonl", "--output-prefix", "k", "--append-eod"]
    process = start(tmp_path, *flags, "--workers", 2)
    wait_for_progress(tmp_path, "k", process, 2)
    children = workers_of(process.pid)
    if to == "all":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        if to == "a worker first":
            os.kill(children[-1], signal.SIGTERM)
            time.sleep(0.1)
        process.terminate()
    message = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 143, message
    assert gone(children)
    assert message.strip().splitlines() == [
        "megalite: stopped; what is done is in k.partial, and the same command with --resume goes "
        "on"
    ], "no word of Python's, as of semaphores that leaked"
    preprocess(tmp_path, *flags, "--resume")
    assert outputs(tmp_path, "k")["bin"] == outputs(long_corpus, "one")["bin"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_a_chunk_is_handed_over(number: signal.Signals) -> None:
    """A process that was just started would not be known to the pool yet. Another thread may be
    the one that gets the signal."""
    before = signal.getsignal(signal.SIGTERM)
    terminate_as_interrupt()
    handed_over = []

    def hand_over() -> None:
        with _interrupt_held_back():
            os.kill(os.getpid(), number)
            time.sleep(0.01)
            handed_over.append(True)

    release = threading.Event()
    other = threading.Thread(target=release.wait)
    other.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            hand_over()
    finally:
        signal.signal(signal.SIGTERM, before)
        release.set()
        other.join()
    assert handed_over


def test_a_worker_that_is_killed_ends_the_run(corpus: Path, tmp_path: Path) -> None:
    flags = ["--input", corpus / "a.jsonl", "--output-prefix", "k", "--append-eod"]
    process = start(tmp_path, *flags, "--workers", 2)
    wait_for_progress(tmp_path, "k", process, 1)
    children = workers_of(process.pid)
    workers = [
        pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(workers[0], signal.SIGKILL)
    message = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 2, message
    assert "a worker was killed" in message
    assert "--resume" in message
    assert gone(children), "the other worker too"
    preprocess(tmp_path, *flags, "--resume")
    assert outputs(tmp_path, "k")["bin"] == outputs(corpus, "one")["bin"]


def test_two_runs_do_not_share_a_prefix(corpus: Path, tmp_path: Path) -> None:
    flags = ["--input", corpus / "a.jsonl", "--output-prefix", "k"]
    process = start(tmp_path, *flags)
    wait_for_progress(tmp_path, "k", process, 1)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        message = refused(tmp_path, "preprocess_data.py", *flags, "--resume")
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert "another process is writing this dataset" in message
    process.communicate(timeout=120)
    assert process.returncode == 0


def test_nothing_to_resume(corpus: Path, tmp_path: Path) -> None:
    message = refused(tmp_path, "preprocess_data.py", "--input", corpus / "a.jsonl",
                      "--output-prefix", "k", "--resume")  # fmt: skip
    assert "--resume: there is no interrupted run in k.partial" in message
    assert not list(tmp_path.iterdir())


# Bad input


def test_bad_lines_are_counted_and_the_first_five_shown(tmp_path: Path) -> None:
    good, bad = '{"text": "a"}\n', "{'text'}\n"
    (tmp_path / "a.jsonl").write_text(good + bad * 2 + good)
    (tmp_path / "b.jsonl").write_text((bad + good) * 4)
    printed = preprocess(tmp_path, "--input", ".", "--output-prefix", "o")
    assert "6 documents, 6 tokens" in printed
    assert "6 records were left out:" in printed
    assert printed.count("is not JSON") == 5
    assert [line.split(" is ")[0].strip() for line in printed.splitlines() if "is not" in line] == [
        "./a.jsonl: line 2", "./a.jsonl: line 3",
        "./b.jsonl: line 1", "./b.jsonl: line 3", "./b.jsonl: line 5",
    ]  # fmt: skip
    sidecar = read_sidecar(tmp_path / "o_text_document")
    assert sidecar is not None
    assert sidecar.left_out == 6
    before = outputs(tmp_path, "o")
    message = refused(tmp_path, "preprocess_data.py", "--input", "a.jsonl", "--output-prefix", "o",
                      "--strict")  # fmt: skip
    assert "--strict: a.jsonl: line 2 is not JSON" in message
    assert outputs(tmp_path, "o") == before, "what was there is there"
    assert not (tmp_path / "o.partial").exists()


def test_a_gzip_cut_short_is_named(tmp_path: Path) -> None:
    content = gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(5000)))
    (tmp_path / "a.jsonl.gz").write_bytes(content[: len(content) // 2])
    flags = ["--input", "a.jsonl.gz", "--output-prefix", "o"]
    printed = preprocess(tmp_path, *flags)
    assert "cannot be unpacked: it ends in the middle: the file was cut short" in printed
    assert "a.jsonl.gz: line " in printed
    assert "--strict: a.jsonl.gz: line" in refused(tmp_path, "preprocess_data.py", *flags,
                                                   "--strict")  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"\n\n", b"nothing\n"])
def test_inputs_without_a_document(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    message = refused(tmp_path, "preprocess_data.py", "--input", "a.jsonl", "--output-prefix", "o")
    assert message.startswith("megalite: the inputs hold no document")
    assert ("1 record was left out:\n  a.jsonl: line 1 is not JSON" in message) == bool(
        content.strip()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_all_problems_of_a_command_at_once(tmp_path: Path) -> None:
    message = refused(
        tmp_path, "preprocess_data.py", "--inptu", "x", "--split-sentences", "--workers", "two",
        "--dataset-impl", "lazy", "--json-keys", "a", "a", "--output-prefix", "no/where/x",
        "--tokenizer-type", "GPT2BPETokenizer",
    )  # fmt: skip
    assert message.startswith("megalite: 9 problems:")
    for part in (
        "unknown flag --inptu; did you mean --input?",
        "--split-sentences is not in megalite: ",
        "--workers two: expected a whole number",
        "--dataset-impl lazy is not in megalite: ",
        "--input is missing",
        "--json-keys: a is named twice",
        "there is no folder no/where",
        "--tokenizer-type GPT2BPETokenizer needs --vocab-file",
        "--tokenizer-type GPT2BPETokenizer needs --merge-file",
    ):
        assert part in message, message


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("preprocess_data", ["--input", "--output-prefix"]),
        ("merge_datasets", ["--input", "--output-prefix"]),
        ("inspect_dataset", ["--input"]),
        ("train_tokenizer", ["--input", "--output"]),
    ],
)
def test_what_a_tool_needs_is_said_once_and_stands_in_its_usage(
    tmp_path: Path, name: str, flags: list[str]
) -> None:
    message = refused(tmp_path, f"{name}.py")
    assert re.findall(r"(--\S+) is missing", message) == flags
    assert message.count("--") == len(flags), message
    usage, _ = tool(f"{name}.py", "--help", cwd=tmp_path).stdout.decode().split("\n\n", 1)
    assert re.findall(r"--\S+", usage) == flags


def test_flags_of_megatron_are_accepted(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", documents(20))
    flags = ["--input", "a.jsonl", "--tokenizer-type", "ByteTokenizer"]
    preprocess(tmp_path, *flags, "--output-prefix", "o")
    done = tool(
        "preprocess_data.py", *flags, "--output-prefix", "p", "--partitions", 4, "--workers", 1,
        "--keep-sequential-samples", "--dataset-impl", "mmap", "--log-interval", 10, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0
    assert outputs(tmp_path, "p") == outputs(tmp_path, "o")
    told = done.stderr.decode()
    assert "--partitions 4: nothing is partitioned" in told
    assert "20 documents" in told, "a line of progress"


def test_a_full_disk_leaves_what_was_there(corpus: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", documents(10))
    preprocess(tmp_path, "--input", "a.jsonl", "--output-prefix", "o")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    flags = f"--input {corpus}/a.jsonl --output-prefix o"
    command = f"ulimit -f 2000; exec {sys.executable} {TOOL} {flags}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("megalite: o.partial: File too large; what was unfinished is")
    assert len(done.stderr.strip().splitlines()) == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# Memory

WORKER_MB = 600
"""What a worker may need, with documents of --max-document-mb's default."""


def worker_peak_mb(folder: Path, *argv: object) -> float:
    """Largest resident memory of a worker of a whole run."""
    (folder / "peak.py").write_text(f"""
import resource, runpy, sys
if __name__ == "__main__":
    try:
        runpy.run_path({str(TOOL)!r}, run_name="__main__")
    except SystemExit as done:
        assert not done.code
    print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
""")
    done = subprocess.run(
        [sys.executable, "peak.py", *map(str, argv), "--workers", "1"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "left out" not in done.stdout
    return int(done.stdout.split()[-1]) * 1024 / 1e6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[object]]:
    """Flags of tokenizers by their library."""
    vocabularies = pytest.importorskip("vocabularies")
    folder = tmp_path_factory.mktemp("models")
    vocabularies.write_sentencepiece(folder / "bpe.model")
    vocabularies.write_ranks(folder / "ranks.tiktoken")
    return {
        "sentencepiece": ["Llama2Tokenizer", "--tokenizer-model", folder / "bpe.model"],
        "tiktoken": ["TikTokenizer", "--tokenizer-model", folder / "ranks.tiktoken",
                     "--tiktoken-pattern", "o200k_base"],
        "tokenizers": ["HuggingFaceTokenizer", "--tokenizer-model",
                       vocabularies.write_tokenizer_json(folder)],
    }  # fmt: skip


LONGEST = {
    "words": lambda draw, size: " ".join(
        draw.choices(["an", "example", "of", "text"], k=size // 5)
    ),
    "one letter": lambda draw, size: "a" * size,
    "one word": lambda draw, size: "".join(draw.choices("acgt", k=size)),
    "letters": lambda draw, size: "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=size)),
    "letter, sign": lambda _, size: "a!" * (size // 2),
    "Chinese": lambda draw, size: "".join(
        map(chr, draw.choices(range(0x4E00, 0x9FA5), k=size // 3))
    ),
    "Chinese, spaced": lambda draw, size: " ".join(
        map(chr, draw.choices(range(0x4E00, 0x9FA5), k=size // 4))
    ),
    "Armenian, digits": lambda draw, size: "1".join(
        map(chr, draw.choices(range(0x531, 0x557), k=size // 3))
    ),
    "emoji": lambda draw, size: "".join(
        map(chr, draw.choices(range(0x1F300, 0x1F64F), k=size // 4))
    ),
}
"""Texts by their size in UTF-8 [bytes]."""


@pytest.mark.parametrize(
    ("library", "kind", "megabytes"),
    [
        ("sentencepiece", "one letter", 8),
        ("tiktoken", "words", 8),
        ("tiktoken", "one word", 1),
        ("tokenizers", "letter, sign", 1),
        *(
            pytest.param(library, kind, 8, marks=pytest.mark.full)
            for library, kind in [("sentencepiece", "words"), ("sentencepiece", "one word"),
                                  ("tiktoken", "one letter"), ("tiktoken", "one word"),
                                  ("tiktoken", "Armenian, digits")]
        ),
        *(
            pytest.param("tokenizers", kind, 1, marks=pytest.mark.full)
            for kind in LONGEST if kind != "letter, sign"
        ),
    ],
)  # fmt: skip
def test_the_longest_document_and_many_small_ones_fit_into_a_workers_memory(
    tmp_path: Path, models: dict[str, list[object]], library: str, kind: str, megabytes: int
) -> None:
    size = (megabytes << 20) - 100
    text = LONGEST[kind](random.Random(5), size)
    small = "".join(f'{{"text": "{i}"}}\n' for i in range(150_000))
    long = json.dumps({"text": text}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(small + long + "\n" + small)
    longest = default_max_document_mb(str(models[library][0])) == megabytes
    limit = [] if longest else ["--max-document-mb", megabytes]
    peak = worker_peak_mb(
        tmp_path, "--input", "a.jsonl", "--output-prefix", "o", *limit,
        "--tokenizer-type", *models[library],
    )  # fmt: skip
    # Of a small document the process itself and the small ones take the most.
    assert 40 < peak < (WORKER_MB if longest else 180), peak


def test_the_longest_document_depends_on_the_tokenizer(
    tmp_path: Path, models: dict[str, list[object]]
) -> None:
    text = "x y " * (1 << 18)  # with its key above 1 MiB
    write_lines(tmp_path / "a.jsonl", ["short", text])
    flags = ["--input", "a.jsonl", "--tokenizer-type"]
    hf = [*flags, *models["tokenizers"]]
    said = (
        "a.jsonl: line 2 is longer than 1 MB (--max-document-mb); raise it, with up to 500 MB of a "
        "worker's memory for each MB, or use another --tokenizer-type\n"
    )
    assert f"1 record was left out:\n  {said}" in preprocess(tmp_path, *hf, "--output-prefix", "o")
    strict = refused(tmp_path, "preprocess_data.py", *hf, "--output-prefix", "s", "--strict")
    assert strict == f"megalite: --strict: {said}"
    raised = preprocess(tmp_path, *hf, "--output-prefix", "r", "--max-document-mb", 2)
    assert "2 documents" in raised and "left out" not in raised
    other = preprocess(tmp_path, *flags, *models["tiktoken"], "--output-prefix", "t")
    assert "2 documents" in other and "left out" not in other


# The other tools


def test_merge_and_inspect(tmp_path: Path) -> None:
    texts = documents(40)
    folder = tmp_path / "parts"
    folder.mkdir()
    for i in range(2):
        write_lines(tmp_path / "a.jsonl", texts[3 * i : 3 * i + 3])
        preprocess(tmp_path, "--input", "a.jsonl", "--output-prefix", f"parts/p_{i}",
                   "--append-eod", "--workers", 1)  # fmt: skip
    done = tool("merge_datasets.py", "--input", "parts", "--output-prefix", "all", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    write_lines(tmp_path / "a.jsonl", texts[:6])
    preprocess(tmp_path, "--input", "a.jsonl", "--output-prefix", "o", "--append-eod")
    for suffix in ("bin", "idx"):
        merged = (tmp_path / f"all.{suffix}").read_bytes()
        assert merged == outputs(tmp_path, "o")[suffix]
    shown = tool("inspect_dataset.py", "--input", "all", "--document", 4, cwd=tmp_path)
    assert shown.stdout.decode() == texts[4] + "\n"
    ids = tool("inspect_dataset.py", "--input", "all.bin", "--document", 4, "--ids", cwd=tmp_path)
    assert ids.stdout.decode().split() == [str(b) for b in [*texts[4].encode(), 256] if texts[4]]
    again = tool("inspect_dataset.py", "--input=all", "--document=4", cwd=tmp_path)
    assert again.stdout == shown.stdout
    message = refused(tmp_path, "inspect_dataset.py", "--input", "all", "--document", -1)
    assert message == "megalite: --document -1: there are documents 0 to 5\n"
    done = tool("merge_datasets.py", "--input=parts", "--output-prefix=all", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = tool("inspect_dataset.py", "--input", "all", cwd=tmp_path).stdout.decode()
    assert "documents  6" in figures
    verified = tool("inspect_dataset.py", "--input", "all", "--verify", cwd=tmp_path)
    assert verified.returncode == 0
    assert "checksums: as the sidecar says" in verified.stdout.decode()
    content = bytearray((tmp_path / "all.bin").read_bytes())
    content[-2:] = b"\x07\x07"
    (tmp_path / "all.bin").write_bytes(content)
    message = refused(tmp_path, "inspect_dataset.py", "--input", "all", "--verify")
    assert "all.bin holds token id 1799, but its tokenizer has 257" in message
    assert "all.bin: SHA-256" in message


@pytest.mark.parametrize("name", ["preprocess_data", "merge_datasets", "inspect_dataset"])
def test_tools_import_neither_torch_nor_kernels(tmp_path: Path, name: str) -> None:
    code = (
        "import sys, runpy\n"
        f"try: runpy.run_path({str(ROOT / 'tools' / name)!r} + '.py', run_name='__main__')\n"
        "except SystemExit as done: assert not done.code\n"
        "heavy = {'torch', 'megalite_kernels', 'triton', 'pyarrow', 'sentencepiece', 'tiktoken'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels"},
        stdout=subprocess.DEVNULL,
        check=True,
    )
