"""Training with a tokenizer: its tokens in the cache, its end of document, its text at the end."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import vocabularies
from commands import parse, run, violations
from pool import RankPool
from runs import SMALL, run_in_pool

from megalite import pretrain
from megalite.closing import PROMPT_TOKENS
from megalite.config import Config, resolve
from megalite.config_data import DataConfig
from megalite.data import texts as texts_module
from megalite.data.corpus import Corpus, prepare_corpus
from megalite.data.entropy import MOST_PAIRED_TOKENS, TokenCounter
from megalite.data.indexed_reader import IndexedReader
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.loader import Loader
from megalite.data.mixture import prepare_mixture
from megalite.data.record import read_record, record_of
from megalite.data.splits import open_samples
from megalite.errors import DataError
from megalite.parallel.groups import ParallelGroups
from megalite.parallel.machine import Machine
from megalite.preprocessing.run import prepare as preprocess
from megalite.preprocessing.settings import Settings
from megalite.tokenizer.base import Tokenizer
from megalite.tokenizer.bpe import rank_tokenizer
from megalite.tokenizer.byte import ByteTokenizer
from megalite.tokenizer.choose import open_tokenizer
from megalite.tokenizer.null import NullTokenizer
from megalite.tokenizer.sentencepiece import SentencePieceTokenizer
from megalite.tokenizer.settings import TokenizerSettings
from megalite.verification.shrink import shrink


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    vocabularies.write_sentencepiece(folder / "x.model")
    vocabularies.write_ranks(folder / "ranks.tiktoken")
    (folder / "a.txt").write_text(vocabularies.training_text()[:50_000], encoding="utf-8")
    texts = [vocabularies.MIXED, "", "two\nlines", "</s> is text"]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return folder


def llama(files: Path) -> list[str]:
    return ["--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", f"{files}/x.model"]


def tiktoken(files: Path) -> list[str]:
    model = ["--tokenizer-model", f"{files}/ranks.tiktoken", "--tiktoken-pattern", "llama3"]
    return ["--tokenizer-type", "TikTokenizer", *model]


def each(files: Path) -> list[Tokenizer]:
    return [
        SentencePieceTokenizer(f"{files}/x.model", bos=True),
        SentencePieceTokenizer(f"{files}/x.model", bos=False),
        rank_tokenizer(f"{files}/ranks.tiktoken", "llama3"),
        rank_tokenizer(f"{files}/ranks.tiktoken", "gpt2"),
    ]


def prepare(path: Path, cache: Path, tokenizer: Tokenizer | None = None) -> Corpus:
    return prepare_corpus(DataConfig(data=(str(path),), data_cache_path=str(cache)), tokenizer)


def documents(corpus: Corpus) -> list[list[list[int]]]:
    """Documents of sequences of tokens."""
    reader = IndexedReader(Path(corpus.prefix))
    ends = np.concatenate([[0], np.cumsum(reader.lengths)])
    sequences = [reader.tokens[a:b].tolist() for a, b in pairwise(ends)]
    return [sequences[a:b] for a, b in pairwise(reader.documents.tolist())]


# The corpus


def test_documents_of_json_lines(files: Path, tmp_path: Path) -> None:
    texts = [json.loads(line)["text"] for line in (files / "a.jsonl").read_text().splitlines()]
    for tokenizer in each(files):
        corpus = prepare(files / "a.jsonl", tmp_path, tokenizer)
        encoded = [tokenizer.encode(text) for text in texts]
        want = [[[*tokens, tokenizer.eod]] if tokens else [] for tokens in encoded]
        assert documents(corpus) == want
        assert corpus.text_bytes == sum(len(t.encode()) for t in texts)
        assert corpus.max_token == max(t for document in want for row in document for t in row)


def test_a_text_file_is_one_document_of_many_sequences(files: Path, tmp_path: Path) -> None:
    text = (files / "a.txt").read_text(encoding="utf-8")
    for tokenizer in each(files):
        corpus = prepare(files / "a.txt", tmp_path, tokenizer)
        (sequences,) = documents(corpus)
        tokens = [token for sequence in sequences for token in sequence]
        assert tokens == [*tokenizer.encode(text), tokenizer.eod], "as if it was never cut"
        lengths = {len(sequence) for sequence in sequences}
        assert max(lengths) - min(lengths) <= 1 and 256 <= min(lengths) <= 4096
        assert len(sequences) >= 32, "a share of a twentieth is not empty"
        assert corpus.text_bytes == len(text.encode())
        want = 2.5 / math.log(2) * len(tokens) / len(text.encode())
        assert corpus.bits_per_byte(2.5) == pytest.approx(want, rel=1e-14)


def test_a_short_text_is_one_sequence(files: Path, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("short")
    for tokenizer in each(files):
        corpus = prepare(tmp_path / "b.txt", tmp_path, tokenizer)
        assert documents(corpus) == [[[*tokenizer.encode("short"), tokenizer.eod]]]


def test_a_huge_text_is_tokenized_in_parts(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At line ends, or between the characters of a long line; memory holds a part at a time."""
    monkeypatch.setattr(texts_module, "PART_BYTES", 1000)
    tokenizer = rank_tokenizer(f"{files}/ranks.tiktoken", "llama3")
    seen: list[str] = []

    def watched(texts: list[str]) -> list[np.ndarray]:
        seen.extend(texts)
        return [np.array(tokenizer.encode(text), np.int32) for text in texts]

    monkeypatch.setattr(tokenizer, "encode_batch", watched)
    content = vocabularies.MIXED * 20 + "中文字😀" * 2000 + "\n" + vocabularies.MIXED
    (tmp_path / "b.txt").write_text(content, encoding="utf-8")
    corpus = prepare(tmp_path / "b.txt", tmp_path, tokenizer)
    assert len(seen) > 20 and max(map(len, seen)) < 4000
    assert "".join(seen) == content, "no character was cut"
    (sequences,) = documents(corpus)
    tokens = [token for sequence in sequences for token in sequence]
    assert tokenizer.decode(tokens[:-1]) == content
    assert tokens[-1] == tokenizer.eod and tokens.count(tokenizer.eod) == 1


# Texts that are no token ids

NUMBERS = NullTokenizer(100)


def refused(path: Path, cache: Path) -> list[str]:
    with pytest.raises(DataError) as caught:
        prepare(path, cache, NUMBERS)
    assert {each.suffix for each in cache.iterdir()} == {".lock"}, "no half of a corpus stays"
    return caught.value.violations


def test_records_of_token_ids(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "5 6 7"}\n{"text": ""}\n{"text": "8"}\n')
    assert documents(prepare(path, tmp_path / "cache", NUMBERS)) == [[[5, 6, 7, 99]], [], [[8, 99]]]


def test_a_record_that_is_no_token_ids_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "5"}\n\n{"text": "6 100"}\nno\n{"text": "7"}\n')
    assert refused(path, tmp_path / "cache") == [
        f"{path}: line 3 has no tokens: NullTokenizer: '100' is no token id from 0 to 99",
        f"{path}: line 4 is not JSON: Expecting value: line 1 column 1 (char 0); "
        "tools/preprocess_data.py leaves out what cannot be used",
    ]


def test_a_row_that_is_no_token_ids_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["1", "two"]}), path)
    (found,) = refused(path, tmp_path / "cache")
    assert found.startswith(f"{path}: row 2 has no tokens: NullTokenizer: 'two' is no token id")


def test_what_a_tokenizer_puts_around_a_text_is_around_all_of_it(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not around each part: <s> before the first, here with a </s> behind the last."""
    monkeypatch.setattr(texts_module, "PART_BYTES", 1000)
    (tmp_path / "b.txt").write_text(vocabularies.MIXED * 200, encoding="utf-8")
    bos, plain = (SentencePieceTokenizer(f"{files}/x.model", bos=bos) for bos in (True, False))
    begin, end = bos.special["<s>"], bos.eod

    def tokens(name: str, tokenizer: Tokenizer) -> list[int]:
        (sequences,) = documents(prepare(tmp_path / "b.txt", tmp_path / name, tokenizer))
        return [token for row in sequences for token in row]

    expected = tokens("plain", plain)
    assert tokens("bos", bos) == [begin, *expected]
    encode, encode_batch = bos.encode, bos.encode_batch
    monkeypatch.setattr(bos, "encode", lambda text: [*encode(text), end])
    monkeypatch.setattr(
        bos, "encode_batch", lambda texts: [np.append(each, end) for each in encode_batch(texts)]
    )
    assert tokens("both", bos) == [begin, *expected, end]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), NullTokenizer(100)])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """As preprocessing sees it; inside of a text it is a character."""
    text = b"1 2\n3" if isinstance(tokenizer, NullTokenizer) else b"a\n\xef\xbb\xbfb"
    for name, content in (("a.txt", text), ("b.txt", b"\xef\xbb\xbf" + text)):
        (tmp_path / name).write_bytes(content)
    plain, marked = (
        prepare(tmp_path / name, tmp_path / f"cache-{name}", tokenizer)
        for name in ("a.txt", "b.txt")
    )
    assert documents(plain) == documents(marked)
    assert plain.text_bytes == marked.text_bytes == len(text)


@pytest.mark.parametrize("part_bytes", [1, 40, 1 << 20])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_that_is_no_token_ids_is_named(
    tmp_path: Path, part_bytes: int, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the text is cut into parts."""
    monkeypatch.setattr(texts_module, "PART_BYTES", part_bytes)
    path = tmp_path / "a.txt"
    lines = ["1 2 3 4", "", *["6"] * 30, "7 eight 9", "10"]
    path.write_bytes(end.join(lines).encode())
    (found,) = refused(path, tmp_path / "cache")
    assert found == (
        f"{path}: line 33 has no tokens: NullTokenizer: 'eight' is no token id from 0 to 99; "
        "tools/preprocess_data.py --text-documents line leaves out such lines"
    )


@pytest.mark.parametrize("part_bytes", [1, 2, 1000])
def test_no_number_of_a_long_line_is_cut(
    tmp_path: Path, part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts_module, "PART_BYTES", part_bytes)
    numbers = [n % 99 for n in range(5000)]
    (tmp_path / "a.txt").write_text(" ".join(map(str, numbers)))
    (sequences,) = documents(prepare(tmp_path / "a.txt", tmp_path, NUMBERS))
    assert [token for row in sequences for token in row] == [*numbers, 99]


def test_preprocessing_names_the_same_records(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "1"}\n' * 3 + '{"text": "x"}\n' * 7)
    (found,) = refused(path, tmp_path / "cache")
    first, *shown, more = found.splitlines()
    assert f"{path}: at least 7 records cannot be used; tools/preprocess_data.py leaves" in first
    assert more.strip() == "..."
    numbers = TokenizerSettings(tokenizer_type="NullTokenizer")
    job = preprocess(Settings((str(path),), f"{tmp_path}/o", tokenizer=numbers, vocab_size=100))
    report = job.run(lambda progress: None)
    assert [each.strip() for each in shown] == list(report.examples)
    assert report.left_out == 7


def test_the_built_in_corpus_is_no_token_ids(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give texts of token ids with --data") as caught:
        prepare_corpus(DataConfig(data_cache_path=str(tmp_path)), NUMBERS)
    assert ".py: line 1 has no tokens: NullTokenizer: " in str(caught.value)


def test_bytes_that_are_no_text_become_replacement_characters(files: Path, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"a\xffb\xe4\xb8 c")
    for tokenizer in each(files):
        ((sequence,),) = documents(prepare(tmp_path / "b.txt", tmp_path, tokenizer))
        assert sequence == [*tokenizer.encode("a\ufffdb\ufffd c"), tokenizer.eod]


def test_the_cache_knows_the_tokenizer(files: Path, tmp_path: Path) -> None:
    tokenizers = [None, *each(files)]
    corpora = [prepare(files / "a.txt", tmp_path, tokenizer) for tokenizer in tokenizers]
    assert len({corpus.prefix for corpus in corpora}) == len(tokenizers)
    assert len({corpus.fingerprint for corpus in corpora}) == len(tokenizers)
    again = [prepare(files / "a.txt", tmp_path, tokenizer) for tokenizer in tokenizers]
    assert again == corpora
    # A copy of the files is the same tokenizer.
    (tmp_path / "copy.model").write_bytes((files / "x.model").read_bytes())
    copy = SentencePieceTokenizer(f"{tmp_path}/copy.model", bos=True)
    assert prepare(files / "a.txt", tmp_path, copy) == corpora[1]


def test_the_dtype_follows_the_vocabulary(files: Path, tmp_path: Path) -> None:
    small = rank_tokenizer(f"{files}/ranks.tiktoken", "v2", 60_000)
    large = rank_tokenizer(f"{files}/ranks.tiktoken", "v2", 63_000)
    assert small.vocab_size < 65_500 < large.vocab_size
    for tokenizer, dtype in ((small, np.uint16), (large, np.int32)):
        corpus = prepare(files / "a.jsonl", tmp_path, tokenizer)
        assert IndexedReader(Path(corpus.prefix)).tokens.dtype == dtype
        assert corpus.max_token == max(t for [row] in filter(None, documents(corpus)) for t in row)


# Entropies


@pytest.mark.parametrize("size", [3, MOST_PAIRED_TOKENS, MOST_PAIRED_TOKENS + 1, 200_000])
def test_entropies_of_any_vocabulary(size: int) -> None:
    """Exact by token counts; by pairs only of a small vocabulary, so that memory has a bound."""
    tokens = np.random.default_rng(size).integers(0, min(size, 500), 5000)
    counter = TokenCounter(size)
    for part in np.array_split(tokens, 7):
        counter.add(part)
    unigram, bigram = counter.entropies()
    after = Counter(tokens[1:].tolist())
    count = len(tokens) - 1
    assert unigram == pytest.approx(-sum(n / count * math.log(n / count) for n in after.values()))
    assert (bigram > 0) == (size <= MOST_PAIRED_TOKENS)
    assert (counter.total, counter.largest) == (5000, tokens.max())
    assert len(counter._pairs) <= MOST_PAIRED_TOKENS**2


def test_pairs_that_were_not_counted_are_not_told(files: Path, tmp_path: Path) -> None:
    llama3 = prepare(files / "a.txt", tmp_path, each(files)[2])
    assert llama3.unigram_nats > 4 and llama3.bigram_nats == 0
    assert llama3.describe().endswith(" nats by token counts")
    assert prepare(files / "a.txt", tmp_path, each(files)[0]).describe().endswith(" by pairs")


# The loader


def test_the_loss_after_an_end_of_document_is_the_tokenizers(files: Path, tmp_path: Path) -> None:
    config = run(
        *(*llama(files), "--data", f"{files}/a.jsonl", "--eod-mask-loss", "--seq-length", "16"),
        *("--data-cache-path", str(tmp_path), "--split", "100,0", "--eval-steps", "0"),
    )
    tokenizer = open_tokenizer(config.data)
    samples = open_samples(config, prepare_mixture(config.data, tokenizer))
    loader = Loader(config, *samples[:2], ParallelGroups.solo().dp, torch.device("cpu"))
    seen = 0
    for micro_batch in loader.train_batch(0).micro_batches:
        assert torch.equal(micro_batch.mask, micro_batch.tokens != tokenizer.eod)
        seen += int((micro_batch.tokens == tokenizer.eod).sum())
    assert seen
    # Of a .bin too, whose tokenizer is given; not if it is unknown.
    writer = IndexedWriter(tmp_path / "p", np.dtype("<u2"))
    writer.add_sequence(np.arange(900))
    writer.end_document()
    writer.close()
    assert run(*llama(files), "--data", f"{tmp_path}/p", "--eod-mask-loss")
    (sentence,) = violations("--data", f"{tmp_path}/p", "--eod-mask-loss", "--vocab-size", "999")
    assert sentence.endswith("is not known; give its --tokenizer-type")


def test_tokens_outside_the_vocabulary_are_refused(files: Path, tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "p", np.dtype("<u2"))
    writer.add_sequence(np.array([999, 1000] * 500))
    writer.end_document()
    writer.close()
    config = run(*llama(files), "--data", f"{tmp_path}/p")
    assert config.model.vocab_size == 1000
    with pytest.raises(DataError, match="holds token id 1000, but --vocab-size is 1000"):
        open_samples(config, prepare_mixture(config.data))


# Whole runs


def flags(files: Path, tmp_path: Path, *more: str) -> list[str]:
    small = [word for word in SMALL if word not in ("--sample-length", "--eval-steps", "0")]
    cache = ["--data", f"{files}/a.txt", "--data-cache-path", str(tmp_path / "cache")]
    return [*small, *cache, "--sample-length", "12", "--eval-steps", "1", *more]


@pytest.mark.parametrize("choose", [llama, tiktoken], ids=["Llama2Tokenizer", "TikTokenizer"])
def test_a_run_with_a_tokenizer(
    pool: RankPool, files: Path, tmp_path: Path, choose: Callable[[Path], list[str]]
) -> None:
    words = flags(files, tmp_path, *choose(files))
    done = run_in_pool(pool, words, 1, tmp_path / "runs")
    config = run(*words)
    tokenizer = open_tokenizer(config.data)
    assert done.weights["model.embed_tokens.weight"].shape[0] == tokenizer.vocab_size
    assert done.losses[0] == pytest.approx(math.log(tokenizer.vocab_size), rel=0.1)
    assert done.losses[-1] < done.losses[0]
    # The prompt is the text of the first validation tokens.
    mixture = prepare_mixture(config.data, tokenizer)
    _, valid, _ = open_samples(config, mixture)
    prompt = tokenizer.decode(valid.read(0)[:PROMPT_TOKENS].tolist())
    assert f"sample, continuing {prompt!r}:" in done.stdout
    assert prompt.strip()[:10] in (files / "a.txt").read_text(encoding="utf-8")
    # Bits per byte are those of the text.
    bits = mixture.bits_per_byte(done.valid_losses[-1])
    assert f"= {bits:.4f} bits per byte" in done.stdout
    assert ("by pairs" in done.stdout) == (tokenizer.vocab_size <= MOST_PAIRED_TOKENS)
    # What was saved says which tokenizer it was, and runs again.
    (folder,) = (tmp_path / "runs").iterdir()
    saved = json.loads((folder / "config.json").read_text())["data"]
    assert saved["tokenizer_type"] == config.data.tokenizer_type
    assert saved["tokenizer_model"] == config.data.tokenizer_model
    assert saved["tiktoken_pattern"] == config.data.tiktoken_pattern
    assert read_record(folder) == record_of(mixture, tokenizer.fingerprint)
    again = run("--config", f"{folder}/config.json")
    assert (again.data, again.model) == (config.data, config.model)


@pytest.mark.full
def test_layouts_see_the_same_tokens(pool: RankPool, files: Path, tmp_path: Path) -> None:
    words = flags(files, tmp_path, *llama(files), "--precision", "fp32")
    one = run_in_pool(pool, words, 1, tmp_path / "runs")
    four = run_in_pool(pool, [*words, "--tp", "2", "--pp", "2"], 4, tmp_path / "runs")
    assert four.losses == pytest.approx(one.losses, rel=1e-5)
    assert (
        four.stdout.split("sample, continuing")[1].splitlines()[0]
        == (one.stdout.split("sample, continuing")[1].splitlines()[0])
    )


def test_a_bin_with_its_tokenizer_shows_text(pool: RankPool, files: Path, tmp_path: Path) -> None:
    corpus = prepare(files / "a.txt", tmp_path, each(files)[0])
    words = flags(files, tmp_path, *llama(files))
    Path(f"{corpus.prefix}.json").unlink()  # as others write datasets
    words[words.index("--data") + 1] = corpus.prefix
    del words[words.index("--data-cache-path") : words.index("--data-cache-path") + 2]
    done = run_in_pool(pool, words, 1, tmp_path / "runs")
    assert "sample, continuing " in done.stdout
    assert "bits per byte" not in done.stdout, "how long the text was is not in a .bin"


def test_ranks_agree_on_the_tokenizer(files: Path, tmp_path: Path) -> None:
    prints = set()
    for choose in (llama, tiktoken):
        words = flags(files, tmp_path, *choose(files), "--device", "cpu")
        prepared = pretrain._prepare(parse(*words), None, Machine(0, 1, 0, None))
        tokenizer = open_tokenizer(resolve(parse(*words).config).data)
        assert prepared.facts["tokenizer"] == tokenizer.fingerprint
        prints.add(prepared.facts["tokenizer"])
    assert len(prints) == 2


def test_a_verification_needs_no_tokenizer(files: Path) -> None:
    """It runs on random tokens in a small vocabulary."""
    small = shrink(run(*llama(files))).config
    assert small.data == Config().replace(eod_mask_loss=True, reset_position_ids=False).data
