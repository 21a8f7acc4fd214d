"""Every flag of the Megatron-LM table sets the field it stands for, or asks for what is done
anyway, or is refused in one sentence that names it; none is ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import parse, violations, word_violations

from megalite.config import Config, fields
from megalite.field_values import is_words
from megalite.megatron_flags import MEGATRON_FLAGS, Alias, Always, Follows, Refused, With

SPECS = {spec.name: spec for spec in fields()}
ALIASES = {flag: m for flag, m in MEGATRON_FLAGS.items() if isinstance(m, Alias)}
ALWAYS = {flag: m for flag, m in MEGATRON_FLAGS.items() if isinstance(m, Always)}
WITH = {flag: m for flag, m in MEGATRON_FLAGS.items() if isinstance(m, With)}
FOLLOWS = {flag: m for flag, m in MEGATRON_FLAGS.items() if isinstance(m, Follows)}
REFUSED = {flag: m for flag, m in MEGATRON_FLAGS.items() if isinstance(m, Refused)}


def value(config: Config, name: str) -> Any:
    return getattr(getattr(config, SPECS[name].group), name)


def test_the_table_is_whole() -> None:
    kinds = (ALIASES, ALWAYS, WITH, FOLLOWS, REFUSED)
    assert sum(map(len, kinds)) == len(MEGATRON_FLAGS)
    assert min(len(ALIASES), len(ALWAYS), len(REFUSED)) > 15
    ours = {spec.flag for spec in SPECS.values()} | {"--config", "--dry-run", "--print-config"}
    ours |= {f"--no-{flag[2:]}" for flag in ours}
    assert not ours & set(MEGATRON_FLAGS)
    for flag, meaning in MEGATRON_FLAGS.items():
        assert flag.startswith("--") and flag == flag.lower() and "_" not in flag
        why = getattr(meaning, "why", "is a sentence")
        assert len(why) > 10 and why.removesuffix("...")[-1] != ".", f"{flag}: {why}"


# Aliases


def text_for(name: str) -> str:
    """A value, other than the default, as it is typed."""
    spec = SPECS[name]
    if spec.choices:
        return next(choice for choice in reversed(spec.choices) if choice != spec.default)
    return {int: "24", float: "0.375"}.get(spec.type, "some/where")


@pytest.mark.parametrize("flag", [f for f, m in ALIASES.items() if m.value is None])
def test_an_alias_with_a_value_equals_our_flag(flag: str) -> None:
    spec = SPECS[ALIASES[flag].field]
    text = text_for(spec.name)
    config = parse(flag, text).config
    assert config == parse(spec.flag, text).config == parse(f"{flag}={text}").config
    want = (text,) if is_words(spec) else spec.type(text)
    assert value(config, spec.name) == want != spec.default
    assert config.replace(**{spec.name: value(parse().config, spec.name)}) == parse().config, (
        "and nothing else"
    )


@pytest.mark.parametrize("flag", [f for f, m in ALIASES.items() if m.value is not None])
def test_an_alias_without_a_value_equals_our_flag(flag: str) -> None:
    spec, text = SPECS[ALIASES[flag].field], ALIASES[flag].value
    switches = {"false": f"--no-{spec.flag[2:]}", "true": spec.flag}
    ours = [switches[text]] if text in switches else [spec.flag, str(text)]
    assert parse(flag).config == parse(*ours).config
    assert word_violations(flag, "stray") == [
        "'stray' stands alone: values follow a flag, as in --data stray"
    ]


@pytest.mark.parametrize(
    ("argv", "name", "want"),
    [
        ("--tensor-model-parallel-size 2", "tp", 2),
        ("--pipeline-model-parallel-size 4", "pp", 4),
        ("--num-query-groups 2", "num_kv_heads", 2),
        ("--num-key-value-heads 2", "num_kv_heads", 2),
        ("--kv-channels 64", "head_dim", 64),
        ("--rotary-base 500000", "rope_theta", 500000.0),
        ("--rotary-position-embeddings-theta 5e5", "rope_theta", 500000.0),
        ("--use-rope-scaling", "rope_scaling", "llama3"),
        ("--layernorm-epsilon 1e-6", "norm_epsilon", 1e-6),
        ("--model llama3.2-1b --untie-embeddings-and-output-weights", "tie_embeddings", False),
        ("--train-iters 500", "steps", 500),
        ("--lr-warmup-iters 20", "lr_warmup_steps", 20),
        ("--lr-decay-iters 300", "lr_decay_steps", 300),
        ("--lr-wsd-decay-iters 30", "lr_wsd_decay_steps", 30),
        ("--eval-iters 3", "eval_steps", 3),
        ("--num-virtual-stages-per-pipeline-rank 3", "chunks", 3),
        ("--enable-zbh1-pipeline", "schedule", "zb-h1"),
        ("--zero-bubble-v-schedule", "schedule", "zb-v"),
        ("--use-distributed-optimizer", "zero", 1),
        ("--use-torch-fsdp2", "zero", 3),
        ("--optimizer-cpu-offload", "offload_optimizer", True),
        ("--deterministic-mode", "deterministic", True),
        ("--use-megatron-fsdp", "zero", 3),
        ("--bf16", "precision", "bf16"),
        ("--fp16", "precision", "fp16"),
        ("--grad-reduce-in-bf16", "grad_reduce_dtype", "bf16"),
        ("--recompute-activations", "recompute", "selective"),
        ("--recompute-granularity full", "recompute", "full"),
        ("--data-path a.txt", "data", ("a.txt",)),
        ("--data-path 0.7 a 0.3 b", "data", ("0.7", "a", "0.3", "b")),
    ],
)
def test_meaning(argv: str, name: str, want: Any) -> None:
    assert value(parse(*argv.split()).config, name) == want


def test_the_meanings_above_are_those_of_all_aliases() -> None:
    (mark,) = test_meaning.pytestmark
    tested = {word for row in mark.args[1] for word in row[0].split()}
    assert set(ALIASES) - tested == set()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (
            "--tp 2 --tensor-model-parallel-size 4",
            "--tp 2 and --tensor-model-parallel-size 4 contradict: give one",
        ),
        (
            "--tensor-model-parallel-size 4 --tp 2",
            "--tp 2 and --tensor-model-parallel-size 4 contradict: give one",
        ),
        (
            "--recompute full --recompute-activations",
            "--recompute full and --recompute-activations contradict: give one",
        ),
        ("--fp16 --bf16", "--bf16 and --fp16 contradict: give one"),
        (
            "--precision fp32 --bf16",
            "--precision fp32 and --bf16 contradict: give one",
        ),
        (
            "--tie-embeddings --untie-embeddings-and-output-weights",
            "--tie-embeddings and --untie-embeddings-and-output-weights contradict: give one",
        ),
        (
            "--num-query-groups 2 --num-key-value-heads 4",
            "--num-query-groups 2 and --num-key-value-heads 4 contradict: give one",
        ),
    ],
)
def test_two_flags_for_one_field_must_agree(argv: str, sentence: str) -> None:
    assert word_violations(*argv.split()) == [sentence]


@pytest.mark.parametrize(
    ("argv", "name", "want"),
    [
        ("--tp 2 --tensor-model-parallel-size 2", "tp", 2),
        ("--precision bf16 --bf16", "precision", "bf16"),
        ("--no-tie-embeddings --untie-embeddings-and-output-weights", "tie_embeddings", False),
        ("--num-query-groups 2 --num-key-value-heads 2", "num_kv_heads", 2),
        ("--recompute-activations --recompute-granularity selective", "recompute", "selective"),
        ("--steps 1000 --train-iters 1_000", "steps", 1000),  # one number in two spellings
        ("--lr 3e-4 --rope-theta 1e4 --rotary-base 10000", "rope_theta", 1e4),
    ],
)
def test_two_flags_for_one_field_may_agree(argv: str, name: str, want: Any) -> None:
    assert value(parse(*argv.split()).config, name) == want


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        ("--recompute-granularity some", "--recompute-granularity"),
        ("--tensor-model-parallel-size two", "--tensor-model-parallel-size"),
        ("--layernorm-epsilon tiny", "--layernorm-epsilon"),
    ],
)
def test_a_wrong_value_is_reported_under_the_flag_that_was_given(argv: str, flag: str) -> None:
    (found,) = word_violations(*argv.split())
    assert found.startswith(f"{flag} {argv.split()[1]}: expected ")


# What follows from other flags too

LAYERS_PER_STAGE = "--num-layers-per-virtual-pipeline-stage"


def test_every_such_flag_is_tested() -> None:
    assert list(FOLLOWS) == [LAYERS_PER_STAGE]


@pytest.mark.parametrize(
    ("argv", "chunks"),
    [
        ("--num-layers 12 --pp 2 {} 2", 3),
        ("{} 2 --pp 2 --num-layers 12", 3),
        ("--model llama3-8b --pp 4 {}=4", 2),
        ("--num-layers 12 --pp 2 {} 6", 1),
        ("--num-layers 12 --pp 2 {} 2 --chunks 3", 3),
        ("--num-layers 12 --pp 2 {} 2 --num-virtual-stages-per-pipeline-rank 3", 3),
    ],
)
def test_chunks_of_layers(argv: str, chunks: int) -> None:
    command = parse(*argv.format(LAYERS_PER_STAGE).split())
    assert command.config.parallel.chunks == chunks
    assert "chunks" in command.given


def test_chunks_of_the_layers_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("num_layers = 12\npp = 3\nchunks = 7\n")
    config = parse("--config", f"{tmp_path}/a.toml", LAYERS_PER_STAGE, "2").config
    assert config.parallel.chunks == 2


@pytest.mark.parametrize(
    ("argv", "sentences"),
    [
        (
            "--num-layers 12 --pp 2 {} 4",
            [
                "{} 4: it does not divide the 6 layers of a rank, --num-layers 12 / --pp 2; try 2 "
                "or 3"
            ],
        ),
        (
            "--num-layers 12 --pp 2 {} 0",
            [
                "{} 0: it does not divide the 6 layers of a rank, --num-layers 12 / --pp 2; try 1 "
                "or 2"
            ],
        ),
        (
            "--num-layers 12 --pp 5 {} 2",
            [
                "{} 2: --num-layers 12 is no multiple of --pp 5: give --chunks, and --pp-layers if "
                "they are not to be balanced"
            ],
        ),
        ("--num-layers 12 --pp 2 {} x", ["{} x: expected a whole number"]),
        ("--num-layers x --pp 2 {} 3", ["--num-layers x: expected a whole number"]),
        (
            "--num-layers 0 --pp 0 {} 3",
            ["--num-layers 0 must be above 0", "--pp 0 must be above 0"],
        ),
        (
            "--num-layers 12 --pp 2 {} 2 --chunks 2",
            ["--chunks 2 and {} 2 contradict: give one"],
        ),
    ],
)
def test_layers_that_make_no_chunks(argv: str, sentences: list[str]) -> None:
    found = violations(*argv.format(LAYERS_PER_STAGE).split())
    assert found == [sentence.format(LAYERS_PER_STAGE) for sentence in sentences]


# What is done anyway


@pytest.mark.parametrize("flag", [f for f, m in ALWAYS.items() if not m.values])
def test_always_without_a_value_changes_nothing(flag: str) -> None:
    assert parse(flag, "--seed", "5").config == parse("--seed", "5").config
    assert word_violations(flag, "stray") == [
        "'stray' stands alone: values follow a flag, as in --data stray"
    ]


@pytest.mark.parametrize(
    ("flag", "text"), [(f, text) for f, m in ALWAYS.items() for text in m.values]
)
def test_always_with_its_value_changes_nothing(flag: str, text: str) -> None:
    assert parse(flag, text).config == parse(f"{flag}={text}").config == parse().config


def test_a_flag_that_needs_another_is_refused_alone() -> None:
    with_number = parse("--group-query-attention", "--num-query-groups", "2").config
    assert with_number == parse("--num-kv-heads", "2").config
    (found,) = word_violations("--group-query-attention")
    assert found.startswith("--group-query-attention alone is not in megalite: ")
    assert "--num-query-groups" in found


@pytest.mark.parametrize("flag", [f for f, m in ALWAYS.items() if m.values])
@pytest.mark.parametrize("text", ["2", "other", ""])
def test_always_refuses_other_values(flag: str, text: str) -> None:
    assert word_violations(flag, text) == [f"{flag} {text} is not in megalite: {ALWAYS[flag].why}"]


# What is refused


@pytest.mark.parametrize("values", [[], ["7"], ["-1"], ["a", "b", "c"]], ids=len)
@pytest.mark.parametrize("flag", REFUSED)
def test_a_refused_flag_gives_one_sentence(flag: str, values: list[str]) -> None:
    sentence = f"{flag} is not in megalite: {REFUSED[flag].why}"
    assert word_violations(flag, *values) == [sentence]
    assert word_violations("--tp", "2", flag, *values, "--pp", "2") == [sentence]
    if len(values) == 1:
        assert word_violations(f"{flag}={values[0]}") == [sentence]


def test_all_refused_flags_at_once_give_a_sentence_each() -> None:
    found = word_violations(*(word for flag in REFUSED for word in (flag, "1")))
    assert len(found) == len(REFUSED)
    for flag, sentence in zip(REFUSED, found, strict=True):
        assert sentence.startswith(f"{flag} is not in megalite: ")


def test_flags_that_sentences_advise_exist() -> None:
    known = {spec.flag for spec in SPECS.values()} | set(MEGATRON_FLAGS)
    for flag, meaning in MEGATRON_FLAGS.items():
        for word in getattr(meaning, "why", "").replace(";", " ").replace(",", " ").split():
            word = word.strip("():")
            if word.startswith("--"):
                assert word in known, f"{flag} advises {word}"
                assert not isinstance(MEGATRON_FLAGS.get(word), Refused), f"{flag}: {word}"
