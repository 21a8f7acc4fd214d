"""Options that name tensors: who is meant, what is refused, and where rates change in the flat
buffers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from commands import run, violations

from megalite.config import Config, resolve
from megalite.estimate import flops_per_token, rank_estimates
from megalite.layers.shard import freeze, named_shards
from megalite.models.llama import LlamaStage
from megalite.models.stage import stage_specs
from megalite.optim.buckets import make_buckets, own_spans
from megalite.optim.segments import segments
from megalite.parallel.tensor import TensorGroup
from megalite.report import opening
from megalite.run_plan import stage_rank
from megalite.tensor_names import EMBEDDING, HEAD, in_layer, layer_of, parameter_names
from megalite.treatment import frozen_names, treatments
from megalite.verification.definition import weight_shapes
from megalite.verification.shrink import shrink

SHAPE = dict(
    num_layers=3, hidden_size=32, num_attention_heads=4, num_kv_heads=2, ffn_hidden_size=24, steps=1
)
NORM = "model.norm.weight"
Q, K, V = (f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv")
UP = "model.layers.1.mlp.up_proj.weight"


def configure(**values: Any) -> Config:
    return resolve(Config().replace(**{**SHAPE, **values}))


def whole_stage(config: Config) -> LlamaStage:
    (spec,) = stage_specs(config)
    where: Any = dict(dtype=torch.float32, device=torch.device("cpu"))
    return LlamaStage(config, spec, tp=TensorGroup.solo(), **where)


# Names


@pytest.mark.parametrize("tied", [False, True])
def test_names_are_those_of_the_modules(tied: bool) -> None:
    config = configure(tie_embeddings=tied)
    held = [tuple(p.name for p in s.pieces) for _, s in named_shards(whole_stage(config))]
    assert sorted(parameter_names(config)) == sorted(held)
    assert set(treatments(config)) == set(weight_shapes(config))


def test_layers_of_names() -> None:
    assert [layer_of(name) for name in (EMBEDDING, Q, NORM, HEAD)] == [None, 1, None, None]
    assert in_layer(UP, 20) == "model.layers.20.mlp.up_proj.weight"


# Rules


def test_without_rules_matrices_decay_and_norm_weights_do_not() -> None:
    for name, treatment in treatments(configure(weight_decay=0.3)).items():
        assert treatment.lr_scale == 1.0
        assert treatment.weight_decay == (0.0 if "norm" in name else 0.3)


def test_the_last_match_counts() -> None:
    words = ("*=2,*.mlp.*=3", "*.1.*=5")
    found = treatments(configure(lr_scale=words, weight_decay_for=("*norm*=0.5", f"{UP}=0")))
    assert [found[n].lr_scale for n in (HEAD, UP, Q)] == [2, 5, 5]
    assert found["model.layers.0.mlp.up_proj.weight"].lr_scale == 3
    assert [found[n].weight_decay for n in (NORM, UP, Q)] == [0.5, 0.0, 0.1]
    backwards = treatments(configure(lr_scale=("*.1.*=5", "*=2")))
    assert backwards[UP].lr_scale == 2


def test_a_pattern_is_of_the_whole_name_in_its_case() -> None:
    found = treatments(configure(lr_scale=("mlp=2", "MODEL.*=3", "model.?orm.weight=4")))
    assert {name for name, t in found.items() if t.lr_scale != 1} == {NORM}


def test_a_tied_embedding_has_two_names() -> None:
    found = treatments(configure(tie_embeddings=True, lr_scale=("lm_head.*=3",)))
    assert found[EMBEDDING].lr_scale == 3
    assert HEAD not in found


def test_flags_take_words_and_commas() -> None:
    config = run("--lr-scale", "lm_head.*=3,*.mlp.*=2", "*norm*=1e-1")
    again = run("--lr-scale=lm_head.*=3", "--lr-scale", "lm_head.*=3", "*.mlp.*=2", "*norm*=0.1")
    assert treatments(config) == treatments(again)
    assert treatments(config)[NORM].lr_scale == 0.1


# What is refused


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--lr-scale lm_head.weight", "expected PATTERN=X, as in lm_head.*=0.1"),
        ("--lr-scale =2", "expected PATTERN=X"),
        ("--lr-scale lm_head.*=fast", "expected PATTERN=X"),
        ("--lr-scale lm_head.*=0", "--lr-scale lm_head.*=0: X must be above 0"),
        ("--lr-scale lm_head.*=-1", "from 0 on"),
        ("--lr-scale lm_head.*=inf", "from 0 on"),
        ("--lr-scale lm_head.*=nan", "from 0 on"),
        ("--weight-decay-for lm_head.*=-0.1", "--weight-decay-for lm_head.*=-0.1: X must be"),
        ("--lr-scale lm_haed.weight=2", "matches no tensor; the nearest are lm_head.weight, "),
        ("--lr-scale model.embed_tokens=2", "the nearest are model.embed_tokens.weight, "),
        ("--lr-scale *.layers.99.*=2", "--lr-scale *.layers.99.*=2 matches no tensor; the nearest"),
        ("--weight-decay-for transformer.wte=0", "matches no tensor; the nearest are "),
        ("--lr-scale lm_head.*=2,*=3", "--lr-scale lm_head.*=2 has no effect: later patterns"),
        ("--lr-scale *=2 *.weight=3", "put the general pattern first"),
    ],
)
def test_a_bad_rule_is_named(flags: str, told: str) -> None:
    (found,) = violations(*flags.split())
    assert told in found
    assert found.startswith(flags.split()[0])


def test_all_bad_rules_are_told_at_once() -> None:
    found = violations("--lr-scale", "a=2", "lm_head.*=x", "--weight-decay-for", "b=1", "--tp", "3")
    assert len([s for s in found if "matches no tensor" in s]) == 2
    assert len(found) >= 4


def test_a_decay_of_zero_and_an_exception_are_right() -> None:
    run("--weight-decay-for", "model.embed_tokens.*=0")
    run("--lr-scale", "*=2,lm_head.*=3")


# Segments


RULES = dict(
    lr_scale=("*.q_proj.*=2", "*.1.*.v_proj.*=3", "*.down_proj.*=4", "lm_head.*=0.5"),
    weight_decay_for=("*.up_proj.*=0.7", "model.norm.*=0.2"),
)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("elements", [1, 4000, 1 << 30])
def test_every_element_gets_the_treatment_of_its_tensor(size: int, elements: int) -> None:
    config = configure(**RULES)
    wanted = treatments(config)
    buckets = make_buckets({0: whole_stage(config)}, size, elements)
    slots = [slot for bucket in buckets for slot in bucket.slots]
    want = {}
    for slot in slots:
        place = torch.arange(slot.start, slot.stop).view(slot.parameter.shape)
        for piece in slot.shard.pieces:
            want |= dict.fromkeys(piece.of(place).flatten().tolist(), wanted[piece.name])
    found: dict[int, Any] = {}
    for rank in range(size):
        spans = own_spans(buckets, rank, size)
        cuts = segments(slots, spans, wanted)
        for span, parts in zip(spans, cuts, strict=True):
            places = range(span.start, span.stop)
            assert [i for part in parts for i in places[part.slice]] == list(places)
            assert all(a.treatment != b.treatment for a, b in pairwise(parts))
            for part in parts:
                found |= dict.fromkeys(places[part.slice], part.treatment)
    assert {place: found[place] for place in want} == want


def test_without_rules_nothing_is_cut() -> None:
    config = configure()
    buckets = make_buckets({0: whole_stage(config)})
    slots = [slot for bucket in buckets for slot in bucket.slots]
    cuts = segments(slots, own_spans(buckets, 0, 1), treatments(config))
    assert all(len(parts) == 1 for parts in cuts)


# Verification


def small(*argv: str) -> Config:
    return shrink(run("--num-layers", "12", *argv)).config


def scaled(config: Config) -> dict[str, float]:
    return {n: t.lr_scale for n, t in treatments(config).items() if t.lr_scale != 1}


def test_the_small_model_has_the_rules_of_the_large_one() -> None:
    config = small("--lr-scale", "*.mlp.*=2", "lm_head.*=3")
    want = {name: 2.0 for name in treatments(config) if ".mlp." in name} | {HEAD: 3.0}
    assert scaled(config) == want
    assert not scaled(small()) and small().parameters == Config().parameters


@pytest.mark.parametrize("layer", range(12))
def test_an_exception_of_one_layer_is_among_the_few(layer: int) -> None:
    layers = {layer_of(n) for n in scaled(small("--lr-scale", f"*.layers.{layer}.*=2"))}
    assert len(layers) == 1 and layers <= {0, 1}


def test_the_ends_of_the_model_stay_its_ends() -> None:
    config = small("--pp", "4", "--weight-decay-for", "model.layers.[0-5].*=0")
    plain = [n for n, t in treatments(config).items() if "mlp" in n and not t.weight_decay]
    assert {layer_of(name) for name in plain} == {0, 1}
    assert config.model.num_layers == 4


# What a dry run says


def test_the_opening_says_what_is_asked_of_how_many() -> None:
    def told(*argv: str) -> list[str]:
        config = run("--num-layers", "3", "--lr", "1", *argv)
        text = opening(config, version="", device="", back_ends=None, data="", folder="")
        return [line.strip() for line in text.splitlines() if "by name" in line]

    assert told() == []
    (line,) = told("--lr-scale", "*.mlp.*=2,lm_head.*=0.1", "--weight-decay-for", "*norm*=0.2")
    assert (
        line.split("by name")[1].strip()
        == "weight decay 0.2: 7 tensors; lr x 2: 9 tensors; lr x 0.1: 1 tensor"
    )


# Frozen parameters


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--freeze ,", "--freeze ,: expected PATTERN"),
        ("--lr-scale ,", "--lr-scale ,: expected PATTERN=X"),
        ("--freeze lm_haed.*", "--freeze lm_haed.* matches no tensor; the nearest are lm_head"),
        ("--freeze lm_head.*=1", "matches no tensor"),
        ("--freeze *", "--freeze * leaves nothing to train"),
        ("--freeze model.*,lm_head.*", "--freeze model.*,lm_head.* leaves nothing to train"),
        ("--freeze *.[qk]_proj.*", "q, k and v of a layer lie in one matrix"),
        (f"--freeze {V}", f"holds {V}, but not {Q}"),
        (f"--freeze {UP}", "gate and up of a layer lie in one matrix; freeze all of them or none"),
        ("--freeze *.mlp.* --lr-scale *.up_proj.*=2", "no effect: --freeze holds all that it"),
        ("--freeze *.mlp.* --weight-decay-for *.up_proj.*=0", "--weight-decay-for *.up_proj.*=0"),
    ],
)
def test_a_bad_pattern_is_named(flags: str, told: str) -> None:
    (found,) = violations("--num-layers", "3", *flags.split())
    assert told in found


def test_patterns_together_may_freeze_what_is_packed() -> None:
    config = run("--freeze", "*.q_proj.*,*.k_proj.*", "*.v_proj.*", "--lr-scale", "*_proj.*=2")
    assert {name.split(".")[-2] for name in frozen_names(config)} == {"q_proj", "k_proj", "v_proj"}


def test_one_side_of_a_tied_pair_freezes_both() -> None:
    config = configure(tie_embeddings=True, pp=2, freeze=("lm_head.*",))
    assert frozen_names(config) == {EMBEDDING}
    for spec in stage_specs(config):
        where: Any = dict(dtype=torch.float32, device=torch.device("cpu"))
        stage = LlamaStage(config, spec, tp=TensorGroup.solo(), **where)
        freeze(stage, frozen_names(config))
        tables = [p for p in stage.parameters() if not p.requires_grad]
        assert [len(table) for table in tables] == [config.model.padded_vocab_size(1)]


PATTERNS = {
    "nothing": (),
    "embedding": (EMBEDDING,),
    "half": (EMBEDDING, "*.layers.[01].*"),
    "matrices": ("*_proj.*",),
    "norms": ("*norm.weight",),
    "rest": (HEAD, NORM, "*.2.*"),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("cut", [dict(), dict(pp=3), dict(pp=2, schedule="zb-v", num_layers=4)])
def test_memory_is_of_what_is_trained(cut: dict[str, Any], pattern: str, tied: bool) -> None:
    config = configure(
        **{"precision": "bf16", "tie_embeddings": tied, "freeze": PATTERNS[pattern], **cut}
    )
    owners = stage_rank(config)
    for rank, memory in enumerate(rank_estimates(config)):
        stages: dict[int, LlamaStage] = {}
        for spec in stage_specs(config):
            if owners[spec.stage] == rank:
                where: Any = dict(dtype=torch.bfloat16, device=torch.device("meta"))
                stages[spec.stage] = LlamaStage(config, spec, tp=TensorGroup.solo(), **where)
                freeze(stages[spec.stage], frozen_names(config))
        last = stages.get(len(owners) - 1)
        if tied and last is not None and 0 in stages:
            last.share_embedding(stages[0])
        held = {id(p): p for stage in stages.values() for p in stage.parameters()}
        trained = sum(p.numel() for p in held.values() if p.requires_grad)
        assert memory.weights == 2 * sum(p.numel() for p in held.values())
        assert (memory.gradients, memory.optimizer) == (4 * trained, 12 * trained)
        # Level 2: a share, and two of the largest buckets.
        sharded = config.replace(dp=2, zero=2, global_batch_size=8)
        buckets = [b.length for b in make_buckets(stages) if b.decays]
        want = 4 * (trained // 2 + 2 * max(buckets, default=0))
        assert rank_estimates(sharded)[rank].gradients == want
        # Level 3: of weights a share and two layers, and whole what is frozen.
        frozen = sum(p.numel() for p in held.values() if not p.requires_grad)
        layers = sorted(b.length for b in make_buckets(stages, by_layer=True) if b.decays)
        want = 2 * (frozen + trained // 2 + sum(layers[-2:]))
        assert rank_estimates(sharded.replace(zero=3))[rank].weights == want


def test_frozen_matrices_cost_no_gradient() -> None:
    model = configure().model
    plain = flops_per_token(configure())
    mlp = 3 * 3 * model.hidden_size * model.ffn_hidden_size
    assert flops_per_token(configure(freeze=("*.mlp.*",))) == plain - 2 * mlp
    assert flops_per_token(configure(freeze=(EMBEDDING,))) == plain, "a lookup"
    head = model.vocab_size * model.hidden_size
    assert flops_per_token(configure(freeze=(HEAD,), tp=2)) == plain - 2 * head
    tied = configure(tie_embeddings=True)
    frozen = configure(tie_embeddings=True, freeze=(HEAD,))
    assert flops_per_token(frozen) == flops_per_token(tied) - 2 * head


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [("*.layers.[0-5].*", {0, 1}), ("*.layers.1?.*,*.layers.[6-9].*", {2, 3}), ("*", set())],
)
def test_the_small_model_is_frozen_where_the_large_one_is(pattern: str, layers: set[int]) -> None:
    flags = [] if pattern == "*" else ["--freeze", pattern]
    frozen = frozen_names(small("--pp", "4", *flags))
    assert {layer_of(name) for name in frozen} == layers


def test_something_is_left_to_train_in_the_small_model() -> None:
    only = "*embed*,lm_head.*,model.norm.*,*.[0-68-9].*,*.1[01].*"
    config = small("--freeze", only)
    names = {n for n, t in treatments(config).items() if not t.frozen}
    assert names and {layer_of(name) for name in names} <= {0, 1}
