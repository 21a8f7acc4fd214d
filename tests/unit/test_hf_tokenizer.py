"""The tokenizer files of an exported model: transformers gives the ids that the run's tokenizer
gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import vocabularies

from megalite.tokenizer.choose import open_tokenizer
from megalite.tokenizer.hf_files import TokenizerFiles, flags_of, hf_files, settings_of
from megalite.tokenizer.settings import TokenizerSettings

transformers = pytest.importorskip("transformers")

LLAMA_LIKE = {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"}
TEXTS = [
    "",
    "Hello world",
    " two  spaces",
    "   ",
    "x = 1\n\ty",
    "ends \n",
    *vocabularies.MIXED.splitlines(keepends=True),
    vocabularies.training_text()[:4000],
]


def written(folder: Path, settings: TokenizerSettings) -> TokenizerFiles:
    """The tokenizer's files in a folder, beside a model's config.json."""
    files = hf_files(settings, open_tokenizer(settings))
    folder.mkdir()
    for name, content in files.files.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return files


def check(folder: Path, settings: TokenizerSettings, texts: list[str]) -> Any:
    files = written(folder, settings)
    assert not files.told
    ours = open_tokenizer(settings)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert files.eos == ours.eod == theirs.eos_token_id
    assert files.bos == theirs.bos_token_id
    for text in texts:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(
            [token for token in ids if token != files.bos]
        )
    return theirs


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "Llama2Tokenizer"])
@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_model_like_llamas(tmp_path: Path, kind: str, prefix: bool) -> None:
    options = {**LLAMA_LIKE, "allow_whitespace_only_pieces": True, "add_dummy_prefix": prefix}
    path = vocabularies.write_sentencepiece(tmp_path / "x.model", "bpe", **options)
    settings = TokenizerSettings(tokenizer_type=kind, tokenizer_model=str(path))
    check(tmp_path / "hf", settings, TEXTS)
    assert (tmp_path / "hf/tokenizer.model").read_bytes() == path.read_bytes()
    # What was exported is what an import is told to take.
    again = settings_of(tmp_path / "hf")
    assert again is not None
    assert flags_of(again) == (
        f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {tmp_path}/hf/tokenizer.json"
    )
    assert open_tokenizer(again).encode(TEXTS[-1]) == open_tokenizer(settings).encode(TEXTS[-1])
    assert open_tokenizer(again).eod == open_tokenizer(settings).eod


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        ("unigram", LLAMA_LIKE, "a model of another type than BPE"),
        ("bpe", {}, "a normalization"),
        ("bpe", {"normalization_rule_name": "identity"}, "spaces that are removed"),
        ("bpe", {**LLAMA_LIKE, "user_defined_symbols": "<|user|>"}, "symbols that a user defined"),
        ("bpe", {**LLAMA_LIKE, "treat_whitespace_as_suffix": True}, "a space behind a word"),
    ],
)
def test_other_sentencepiece_models(
    tmp_path: Path, kind: str, options: dict[str, Any], why: str
) -> None:
    path = vocabularies.write_sentencepiece(tmp_path / "x.model", kind, **options)
    settings = TokenizerSettings(tokenizer_type="Llama2Tokenizer", tokenizer_model=str(path))
    files = hf_files(settings, open_tokenizer(settings))
    assert list(files.files) == ["tokenizer.model"]
    assert files.told.endswith(f"transformers has no equal of one with {why}")


def test_tokenizer_json_goes_along_without_code(tmp_path: Path) -> None:
    vocabularies.write_tokenizer_json(tmp_path)
    beside = {
        "eos_token": {"content": "<|endoftext|>", "__type": "AddedToken"},
        "bos_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "auto_map": {"AutoTokenizer": ["x.Y", None]},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(beside))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    settings = TokenizerSettings(
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path)
    )
    theirs = check(tmp_path / "hf", settings, TEXTS)
    assert theirs.chat_template == "{{ messages }}"
    assert "auto_map" not in (tmp_path / "hf/tokenizer_config.json").read_text()


def test_gpt2s_files_go_along(tmp_path: Path) -> None:
    vocab, merges = vocabularies.write_gpt2(tmp_path)
    settings = TokenizerSettings(
        tokenizer_type="GPT2BPETokenizer", vocab_file=str(vocab), merge_file=str(merges)
    )
    files = written(tmp_path / "hf", settings)
    ours = open_tokenizer(settings)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert files.eos == ours.eod == theirs.eos_token_id
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text)
    folder = tmp_path / "hf"
    again = settings_of(folder)
    assert again is not None
    assert flags_of(again) == (
        f"--tokenizer-type GPT2BPETokenizer --vocab-file {folder}/vocab.json "
        f"--merge-file {folder}/merges.txt"
    )


def test_bytes_have_no_equal(tmp_path: Path) -> None:
    settings = TokenizerSettings()
    files = hf_files(settings, open_tokenizer(settings))
    assert (files.files, files.eos) == ({}, 256)
    assert files.told == "no tokenizer files: transformers has no equal of ByteTokenizer"
    assert settings_of(tmp_path) is None
