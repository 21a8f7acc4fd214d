"""What is wrong with a tokenizer's files or flags is one sentence that names it."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import vocabularies
from commands import run, violations, word_violations

from megalite import pretrain
from megalite.errors import ConfigError
from megalite.tokenizer import bpe, hf
from megalite.tokenizer.bpe import gpt2_tokenizer, rank_tokenizer
from megalite.tokenizer.choose import open_tokenizer
from megalite.tokenizer.hf import HuggingFaceTokenizer
from megalite.tokenizer.null import NullTokenizer
from megalite.tokenizer.sentencepiece import SentencePieceTokenizer
from megalite.tokenizer.settings import PATTERNS, TYPES, TokenizerSettings

SINGLE = {bytes([byte]): byte for byte in range(256)}


def lines(ranks: dict[bytes, int]) -> list[bytes]:
    return [b"%s %d" % (base64.b64encode(token), rank) for token, rank in ranks.items()]


def problem(action: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        action()
    (sentence,) = caught.value.violations
    assert "\n" not in sentence
    return sentence


# Files that are there, and wrong

BAD_RANKS = {
    b"": "is empty",
    b"garbage": "line 1 is b'garbage'; expected a token in base64 and its rank",
    b"\n".join([*lines(SINGLE), b"YWI= x"]): "line 257 is b'YWI= x'; expected",
    b"\n".join([*lines(SINGLE), b"YWI= -1"]): "line 257 is b'YWI= -1'; expected",
    b"\n".join([*lines(SINGLE), b"YWI= 3000000000"]): "line 257 is b'YWI= 3000000000'; expected",
    b"\n".join([*lines(SINGLE), b"YWI= " + b"9" * 5000]): "line 257 is b'YWI= 9999",
    b"\n".join([*lines(SINGLE), b"YWI= 256 1"]): "line 257 is b'YWI= 256 1'; expected",
    b"\n".join([*lines(SINGLE), b"Y?I= 256"]): "line 257 is b'Y?I= 256'; expected",
    b"\n".join([*lines(SINGLE), b"YWI= 255"]): "line 257 has rank 255 a second time",
    b"\n".join([*lines(SINGLE), b"YQ== 256"]): "line 257 has token b'a' a second time",
    b"\n".join(lines(SINGLE)[:-2]): "has no token for 2 of the 256 bytes, the first is b'\\xfe'",
    b"\x0a\x0e\x0a\x05<unk>\x15": "line 2 is ",
}


@pytest.mark.parametrize("content", BAD_RANKS, ids=BAD_RANKS.values())
def test_a_damaged_rank_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ranks"
    path.write_bytes(content)
    sentence = problem(lambda: rank_tokenizer(str(path), "llama3"))
    assert sentence.startswith(str(path)) and BAD_RANKS[content] in sentence


BAD_JSON_RANKS = {
    "{": "is not JSON",
    "{}": "expected a list of objects with rank and token_bytes",
    "[1]": "entry 0 is 1; expected an object with rank 0 and token_bytes",
    '[{"rank": 1, "token_bytes": "AA=="}]': "expected an object with rank 0",
    '[{"rank": 0, "token_bytes": 5}]': "expected an object with rank 0",
    '[{"rank": 0}]': "expected an object with rank 0",
    "[" * 100_000: "is not JSON",
}


@pytest.mark.parametrize("content", BAD_JSON_RANKS, ids=lambda text: text[:40])
def test_a_damaged_json_rank_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ranks.json"
    path.write_text(content)
    sentence = problem(lambda: rank_tokenizer(str(path), "v2"))
    assert sentence.startswith(str(path)) and BAD_JSON_RANKS[content] in sentence


@pytest.mark.parametrize("vocab_size", [1, 1255, 1000 + 300])
def test_a_vocabulary_that_the_ranks_do_not_fill(tmp_path: Path, vocab_size: int) -> None:
    path = vocabularies.write_ranks(tmp_path / "ranks", SINGLE | {b"ab": 256})
    sentence = problem(lambda: rank_tokenizer(str(path), "v2", 1000, vocab_size))
    assert f"--vocab-size {vocab_size} must be from 1256 to 1257" in sentence
    assert rank_tokenizer(str(path), "v2", 1000, 1256).encode("ab") == [1097, 1098]
    assert rank_tokenizer(str(path), "v2", 1000, 1257).encode("ab") == [1256]


@pytest.mark.parametrize("count", [6, (1 << 17) - 255, 1 << 30])
def test_a_number_of_special_tokens_that_cannot_be(tmp_path: Path, count: int) -> None:
    path = vocabularies.write_ranks(tmp_path / "ranks", SINGLE)
    sentence = problem(lambda: rank_tokenizer(str(path), "v1", count))
    assert f"--tiktoken-num-special-tokens {count} must be from 7 to" in sentence


GPT2_DAMAGE = {
    "vocab.json": {
        "": "is empty",
        "{": "is not JSON",
        "[]": "expected one JSON object of tokens and their ids",
        '{"a": "b"}': "expected one JSON object of tokens and their ids",
        '{"a": 1, "b": 1}': "two tokens have one id",
        '{"a": 1}': "needs the token",
    },
    "merges.txt": {
        "": "is empty",
        "#version: 0.2\na b c\n": "line 2 is 'a b c'; expected two tokens",
        "#version: 0.2\na\n": "line 2 is 'a'; expected two tokens",
        "#version: 0.2\na \u4e2d\n": "line 2 is 'a \u4e2d'; expected two tokens",
        "#version: 0.2\nqqq zzz\n": "the merge b'qqq' + b'zzz' needs the token b'qqq', which",
    },
}


@pytest.mark.parametrize(
    ("name", "content"), [(name, text) for name, cases in GPT2_DAMAGE.items() for text in cases]
)
def test_damaged_gpt2_files(tmp_path: Path, name: str, content: str) -> None:
    vocab_file, merge_file = vocabularies.write_gpt2(tmp_path)
    (tmp_path / name).write_text(content, encoding="utf-8")
    sentence = problem(lambda: gpt2_tokenizer(str(vocab_file), str(merge_file)))
    assert f"{tmp_path}/{name}" in sentence and GPT2_DAMAGE[name][content] in sentence


def test_gpt2_files_without_what_is_needed(tmp_path: Path) -> None:
    vocab_file, merge_file = vocabularies.write_gpt2(tmp_path)
    whole = json.loads(vocab_file.read_text())
    vocab_file.write_text(json.dumps({t: i for t, i in whole.items() if t != "<|endoftext|>"}))
    sentence = problem(lambda: gpt2_tokenizer(str(vocab_file), str(merge_file)))
    assert sentence == f"{vocab_file} has no <|endoftext|>, with which a document ends"
    vocab_file.write_text(json.dumps({t: i for t, i in whole.items() if t != "\u0100"}))
    sentence = problem(lambda: gpt2_tokenizer(str(vocab_file), str(merge_file)))
    assert "has no token for 1 of the 256 bytes, the first is b'\\x00'" in sentence
    merge_file.write_bytes(b"\xff\xfe")
    sentence = problem(lambda: gpt2_tokenizer(str(vocab_file), str(merge_file)))
    assert sentence.startswith(f"{merge_file} is not UTF-8 text")


def test_a_merge_of_number_signs_is_no_comment(tmp_path: Path) -> None:
    """GPT-2's own file has some; only its first line is a comment."""
    vocab_file, merge_file = vocabularies.write_gpt2(tmp_path)
    vocabulary = json.loads(vocab_file.read_text())
    merge_file.write_text(merge_file.read_text(encoding="utf-8") + "# #\n", encoding="utf-8")
    vocabulary |= {"##": len(vocabulary)} if "##" not in vocabulary else {}
    vocab_file.write_text(json.dumps(vocabulary))
    tokenizer = gpt2_tokenizer(str(vocab_file), str(merge_file))
    assert tokenizer.encode("##") == [vocabulary["##"]]


@pytest.mark.parametrize("content", [b"", b"junk", b"\x0a\x0e\x0a\x05<unk>\x15\x00"])
def test_a_damaged_sentencepiece_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.model"
    path.write_bytes(content)
    sentence = problem(lambda: SentencePieceTokenizer(str(path), bos=True))
    assert sentence.startswith(f"{path} is ")


def test_a_sentencepiece_model_cut_short(tmp_path: Path) -> None:
    whole = vocabularies.sentencepiece_content()
    for size in (len(whole) // 2, len(whole) - 1):
        (tmp_path / "x.model").write_bytes(whole[:size])
        sentence = problem(lambda: SentencePieceTokenizer(str(tmp_path / "x.model"), bos=False))
        assert sentence.startswith(f"{tmp_path}/x.model is ")


@pytest.mark.parametrize(("missing", "said"), [("eos_id", "</s>"), ("bos_id", "<s>")])
def test_a_sentencepiece_model_without_its_ends(tmp_path: Path, missing: str, said: str) -> None:
    path = vocabularies.write_sentencepiece(tmp_path / "x.model", **{missing: -1})
    sentence = problem(lambda: SentencePieceTokenizer(str(path), bos=True))
    assert sentence.startswith(f"{path} has no ") and f"({said})" in sentence
    if missing == "bos_id":
        SentencePieceTokenizer(str(path), bos=False)


HF_DAMAGE = {
    "": "is empty",
    "{": "is no tokenizer.json",
    "{}": "is no tokenizer.json",
    '{"model": {"type": "nonsense"}}': "is no tokenizer.json",
}


@pytest.mark.parametrize("content", HF_DAMAGE)
def test_a_damaged_tokenizer_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    sentence = problem(lambda: HuggingFaceTokenizer(str(tmp_path)))
    assert sentence.startswith(f"{tmp_path}/tokenizer.json {HF_DAMAGE[content]}")


def test_the_end_of_a_document_must_be_known(tmp_path: Path) -> None:
    path = vocabularies.write_tokenizer_json(tmp_path)
    content = json.loads(path.read_text())
    config = tmp_path / "tokenizer_config.json"
    for text, said in {
        '{"eos_token": "nowhere"}': f"{config}: eos_token 'nowhere' is no token of {path}",
        "{": f"{config} is not JSON",
        "": f"{config} is empty",
    }.items():
        config.write_text(text)
        assert problem(lambda: HuggingFaceTokenizer(str(path))).startswith(said)
    for text in ("{}", "[]", '{"eos_token": null}'):
        config.write_text(text)
        tokenizer = HuggingFaceTokenizer(str(path))
        assert tokenizer.eod == tokenizer.special["<|endoftext|>"]
    content["added_tokens"].append({**content["added_tokens"][0], "content": "</s>", "id": 9999})
    path.write_text(json.dumps(content))
    sentence = problem(lambda: HuggingFaceTokenizer(str(path)))
    assert "(<|endoftext|> and </s> could each be): name it as eos_token" in sentence
    content["added_tokens"] = []
    path.write_text(json.dumps(content))
    sentence = problem(lambda: HuggingFaceTokenizer(str(path)))
    assert "(it has none of the usual): name it as eos_token" in sentence


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "find_spec", lambda _: None)
    sentence = problem(lambda: HuggingFaceTokenizer("tokenizer.json"))
    assert "tokenizers: pip install 'megalite[hf]'" in sentence
    monkeypatch.setattr(bpe, "find_spec", lambda _: None)
    sentence = problem(lambda: bpe.BytePairTokenizer(".", SINGLE, None, {}, 0, engine="tiktoken"))
    assert sentence == "tiktoken is not installed: pip install tiktoken"


@pytest.mark.parametrize("text", ["1 x", "-1", "10", "1.5", "٣", "9" * 5000])
def test_numbers_that_are_no_tokens(text: str) -> None:
    sentence = problem(lambda: NullTokenizer(10).encode(text))
    assert "is no token id from 0 to 9" in sentence
    assert NullTokenizer(10).decode(NullTokenizer(10).encode(" 1  2\n9 ")) == "1 2 9"


# Files that are not there

FILES = {
    "SentencePieceTokenizer": ("tokenizer_model",),
    "TikTokenizer": ("tokenizer_model",),
    "HuggingFaceTokenizer": ("tokenizer_model",),
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("what", ["missing", "folder", "name that is too long"])
def test_a_file_that_cannot_be_read(tmp_path: Path, kind: str, what: str) -> None:
    (tmp_path / "folder").mkdir()
    name = str(tmp_path / (what if what != "name that is too long" else "x" * 300))
    values = dict.fromkeys(FILES[kind], name)
    if kind == "TikTokenizer":
        values["tiktoken_pattern"] = "llama3"
    sentence = problem(lambda: open_tokenizer(TokenizerSettings(tokenizer_type=kind, **values)))
    assert sentence.startswith(name) and " cannot be read: " in sentence


@pytest.mark.parametrize("kind", TYPES)
def test_every_setting_that_a_type_needs_is_named(kind: str) -> None:
    settings = TokenizerSettings(tokenizer_type=kind)
    if not TYPES[kind]:
        open_tokenizer(settings)
        return
    with pytest.raises(ConfigError) as caught:
        open_tokenizer(settings)
    flags = [f"--{name.replace('_', '-')}" for name in TYPES[kind]]
    said = caught.value.violations
    assert [sentence.split(",")[0] for sentence in said] == [
        f"--tokenizer-type {kind} needs {flag}" for flag in flags
    ]


# On the command line


def test_flags_of_tokenizers(tmp_path: Path) -> None:
    model = vocabularies.write_sentencepiece(tmp_path / "x.model")
    ranks = vocabularies.write_ranks(tmp_path / "ranks.tiktoken")
    llama = ("--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", str(model))
    assert run(*llama).model.vocab_size == 1000
    assert run(*llama, "--vocab-size", "1003").model.vocab_size == 1003
    assert run(*llama, "--mock-data").model.vocab_size == 1000
    tiktoken = ("--tokenizer-type", "TikTokenizer", "--tokenizer-model", str(ranks))
    for pattern in PATTERNS:
        config = run(*tiktoken, "--tiktoken-pattern", pattern)
        tokenizer = open_tokenizer(config.data, config.model.vocab_size)
        assert config.model.vocab_size == tokenizer.vocab_size
        again = open_tokenizer(config.data)
        assert again.fingerprint == tokenizer.fingerprint
    assert run(
        *tiktoken, "--tiktoken-pattern", "v2", "--tiktoken-num-special-tokens", "9",
        "--vocab-size", "400",
    ).model.vocab_size == 400  # fmt: skip
    assert run(
        *("--tokenizer-type", "NullTokenizer", "--vocab-size", "300", "--mock-data")
    ).model.vocab_size == 300  # fmt: skip
    assert violations(*llama, "--vocab-size", "999") == [
        "--vocab-size 999 is below the 1000 tokens of Llama2Tokenizer"
    ]
    (sentence,) = violations(*llama[:3], str(tmp_path / "y.model"))
    assert sentence == (
        f"--tokenizer-type Llama2Tokenizer: {tmp_path}/y.model cannot be read: No such file or "
        "directory"
    )
    (sentence,) = violations(*tiktoken, "--tiktoken-pattern", "o200k")
    assert sentence.endswith("; did you mean o200k_base?")
    assert "--tiktoken-pattern o200k: expected one of gpt2, " in sentence
    (sentence,) = word_violations("--tokenizer-type", "LlamaTokenizer")
    assert sentence.endswith("; did you mean Llama2Tokenizer?")


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    found = violations(
        *("--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", str(tmp_path / "v.json")),
        *("--tokenizer-model", "x.model", "--tp", "3"),
    )
    assert any("GPT2BPETokenizer needs --merge-file" in sentence for sentence in found)
    assert any("--tokenizer-model x.model has no effect without" in sentence for sentence in found)
    assert any("--tp 3" in sentence for sentence in found)


def test_a_bad_file_ends_in_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.model").write_bytes(b"junk")
    flags = ["--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", f"{tmp_path}/x.model"]
    assert pretrain.main([*flags, "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"megalite: --tokenizer-type Llama2Tokenizer: {tmp_path}/x.model is no SentencePiece "
        "model, or it is damaged\n"
    )


def test_a_dry_run_with_a_tokenizer_imports_no_torch(tmp_path: Path) -> None:
    model = vocabularies.write_sentencepiece(tmp_path / "x.model")
    code = (
        "import sys; from megalite import pretrain; "
        f"code = pretrain.main(['--dry-run', '--tokenizer-type', 'Llama2Tokenizer', "
        f"'--tokenizer-model', {str(model)!r}]); "
        "sys.exit(code or 'torch' in sys.modules or 'numpy' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "1000" in result.stdout or "1,000" in result.stdout
