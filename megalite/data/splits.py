"""Training and validation samples of a run: which sequences, in which order. No torch import."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from megalite.config import Config, with_steps
from megalite.data.best_fit_samples import BestFitSamples
from megalite.data.blend import normalized
from megalite.data.blended_samples import BlendedSamples
from megalite.data.cache import cache_folder
from megalite.data.corpus import Corpus
from megalite.data.fill_in_middle import FillInTheMiddle, FillInTheMiddleSamples
from megalite.data.index_cache import IndexCache
from megalite.data.indexed_reader import IndexedReader
from megalite.data.megatron_samples import MegatronSamples
from megalite.data.mixture import Mixture, Part
from megalite.data.samples import DocumentSamples, MockSamples, StreamSamples
from megalite.data.sentinels import find_sentinels
from megalite.data.token_store import TokenStore
from megalite.errors import DataError
from megalite.tokenizer.choose import open_tokenizer
from megalite.wording import counted

MEGATRON_SURPLUS = 0.005
"""Megatron-LM builds so much more of each dataset of a blend than its weight asks for."""

ENDS_LOOKED_AT = 1000
"""Documents of each split of a dataset: reading their last tokens takes a few milliseconds."""


@dataclass(frozen=True)
class _Request:
    """Samples of one split.

    Attributes:
        which: "training", "validation" or "test".
        share: which share of `--split` of each part; None: all of it.
        samples: that the run takes.
        order_samples: that Megatron-LM's order is made for.
        may_be_empty: nobody will read it.
    """

    which: str
    share: int | None
    samples: int
    order_samples: int
    may_be_empty: bool = False


class SplitSamples(NamedTuple):
    """Samples of a run; None: nothing is tested."""

    train: DocumentSamples
    valid: DocumentSamples
    test: DocumentSamples | None


def open_samples(config: Config, mixture: Mixture) -> SplitSamples:
    """The samples of all splits.

    Raises:
        DataError: a split is shorter than one sample or than the order needs, token ids exceed the
            vocabulary, or an index cannot be kept.
    """
    model, train = config.model, config.train
    if config.data.mock_data:
        return SplitSamples(
            MockSamples(model.seq_length, model.vocab_size, train.seed),
            MockSamples(model.seq_length, model.vocab_size, train.seed + 1),
            None,
        )
    evaluated = train.eval_steps * train.global_batch_size
    validations = 1
    if train.eval_interval:  # Megatron-LM's order is made for all validations of the run
        validations += train.steps // train.eval_interval
    whole = bool(config.data.train_data_path)

    def opened(which: str, share: int, samples: int, order_samples: int) -> DocumentSamples:
        own = (mixture.train, mixture.valid, mixture.test)[share]
        request = _Request(
            which, None if whole else share, samples, order_samples, may_be_empty=not samples
        )
        return _open_split(config, own or mixture.train, request)

    return SplitSamples(
        opened("training", 0, config.num_train_samples, config.data.order_samples),
        opened("validation", 1, evaluated, validations * evaluated),
        opened("test", 2, evaluated, evaluated) if has_test(config) else None,
    )


def has_test(config: Config) -> bool:
    """Whether the run ends with a test: there is data for it, and batches are asked for."""
    data = config.data
    if data.mock_data or not config.train.eval_steps:
        return False
    if data.train_data_path:
        return bool(data.test_data_path)
    return sum(map(float, data.split.split(",")[2:])) > 0


def _open_split(config: Config, parts: Sequence[Part], request: _Request) -> DocumentSamples:
    """The samples of one split, blended if there are many parts."""
    opened, problems = [], []
    transform = _fill_in_the_middle(config) if request.which == "training" else None
    for part, samples in zip(parts, _samples_of_parts(config, parts, request), strict=True):
        try:
            found = _open_part(config, part.corpus, request, samples)
            if transform is not None:
                seed, fingerprint = config.train.seed, part.corpus.fingerprint
                found = FillInTheMiddleSamples(found, transform, seed, fingerprint)
            opened.append(found)
        except DataError as error:
            problems += error.violations
    if problems:
        raise DataError(problems)
    if len(opened) == 1:
        return opened[0]
    if not all(part.num_samples for part in opened):
        # Nobody reads it.
        return opened[0]
    cache = IndexCache(cache_folder(config.data))
    weights = _weights(parts)
    if config.data.data_order == "epoch":
        return BlendedSamples(opened, weights, request.samples, cache)
    return _blend_as_megatron(opened, weights, request, cache)


def _fill_in_the_middle(config: Config) -> FillInTheMiddle | None:
    """What happens to training samples; validation stays comparable whatever the rate."""
    data = config.data
    if not data.fim_rate:
        return None
    tokenizer = open_tokenizer(data, config.model.vocab_size)
    sentinels = find_sentinels(data, tokenizer)
    return FillInTheMiddle(data.fim_rate, data.fim_spm_rate, tokenizer, sentinels)


def _weights(parts: Sequence[Part]) -> list[float] | None:
    weights = [part.weight for part in parts if part.weight is not None]
    return weights or None


def _samples_of_parts(config: Config, parts: Sequence[Part], request: _Request) -> list[int | None]:
    """Samples that Megatron-LM's order of each part is made for; None: those of one epoch."""
    weights = _weights(parts)
    if weights is None or (len(parts) == 1 and config.data.train_data_path):
        return [request.order_samples] if len(parts) == 1 else [None] * len(parts)
    return [
        math.ceil(math.ceil(request.order_samples * weight) * (1 + MEGATRON_SURPLUS))
        for weight in normalized(weights)
    ]


def _blend_as_megatron(
    parts: Sequence[DocumentSamples],
    weights: Sequence[float] | None,
    request: _Request,
    cache: IndexCache,
) -> DocumentSamples:
    """Megatron-LM's blend of its datasets; without weights each is used at most once."""
    sizes = [part.num_samples for part in parts]
    if weights is None and request.samples > sum(sizes):
        raise DataError(
            f"--data-order megatron uses each dataset of a blend without weights once: "
            f"{counted(sum(sizes), f'{request.which} sample')}, but the run takes "
            f"{request.samples:,}; give weights, fewer steps or --data-order epoch"
        )
    # It divides given weights by their sum twice, which rounds twice.
    ratios = [float(size) for size in sizes] if weights is None else normalized(weights)
    blended = BlendedSamples(parts, ratios, request.samples, cache)
    if blended.num_samples < request.samples:
        raise DataError(
            f"--data-order megatron: this blend takes more {request.which} samples of a dataset "
            "than Megatron-LM prepares; give other weights or --data-order epoch"
        )
    return blended


def _open_part(
    config: Config, corpus: Corpus, request: _Request, order_samples: int | None
) -> DocumentSamples:
    """The samples of one part's share."""
    data, model = config.data, config.model
    if corpus.max_token >= model.vocab_size:
        raise DataError(
            f"{corpus.description} holds token id {corpus.max_token}, but --vocab-size is "
            f"{model.vocab_size}: give the size of its tokenizer"
        )
    reader = IndexedReader(corpus.prefix)  # type: ignore[arg-type]
    store = TokenStore(reader, corpus.description, model.vocab_size)
    begin, end = 0, len(reader.lengths)
    if request.share is not None:
        begin, end = split_bounds(data.split, end)[request.share]
    _check_ends(config, corpus, store, (begin, end))
    start = int(reader.lengths[:begin].sum(dtype=np.int64))
    stop = start + int(reader.lengths[begin:end].sum(dtype=np.int64))
    seq, seed = model.seq_length, config.train.seed
    if data.packing == "best-fit":
        cache = IndexCache(cache_folder(data))
        packed = BestFitSamples(store, corpus.fingerprint, begin, end, seq, seed, cache)
        if not packed.num_samples and not request.may_be_empty:
            raise DataError(
                _no_sample(config, corpus, request, "no document of two tokens or more")
            )
        return packed
    stream = StreamSamples(store, start, stop, seq, seed)
    if not stream.num_samples and not request.may_be_empty:
        found = f"{counted(stop - start, 'token')}, fewer than one sample of --seq-length {seq} + 1"
        raise DataError(_no_sample(config, corpus, request, found))
    if data.data_order == "epoch" or not stream.num_samples:
        return stream
    return MegatronSamples(
        store,
        corpus.fingerprint,
        begin,
        end,
        order_samples,
        seq,
        seed,
        IndexCache(cache_folder(data)),
    )


def _check_ends(
    config: Config, corpus: Corpus, store: TokenStore, sequences: tuple[int, int]
) -> None:
    """Options about ends of documents would do nothing on documents in which none is marked."""
    asked = ["--packing best-fit"] if config.data.packing == "best-fit" else []
    names = ("reset_attention_mask", "reset_position_ids", "eod_mask_loss")
    asked += [f"--{name.replace('_', '-')}" for name in names if getattr(config.data, name)]
    if not asked:
        return
    eod = open_tokenizer(config.data, config.model.vocab_size).eod
    remedy = "preprocess it with --append-eod, or give its --tokenizer-type"
    if not corpus.append_eod:
        raise DataError(
            f"{asked[0]}: {corpus.description} was preprocessed without --append-eod, by its "
            "sidecar: preprocess it with --append-eod"
        )
    if corpus.eod not in (None, eod):
        raise DataError(
            f"{asked[0]}: documents of {corpus.description} end with token {corpus.eod}, by its "
            f"sidecar, not with {eod}: {remedy}"
        )
    last = store.last_tokens(*sequences, ENDS_LOOKED_AT)
    wrong = last[last != eod]
    if len(wrong):
        raise DataError(
            f"{asked[0]}: {len(wrong):,} of the {counted(len(last), 'document')} of "
            f"{corpus.description} that were looked at have no end: they end with token {wrong[0]} "
            f"or others, not with {eod}: {remedy}"
        )


def _no_sample(config: Config, corpus: Corpus, request: _Request, found: str) -> str:
    split = config.data.split
    whose = f"the {request.which} share of --split {split}" if request.share is not None else "it"
    sentence = f"{corpus.description}: {whose} holds {found}: give more text"
    if config.data.packing == "stream":
        sentence += ", a shorter --seq-length"
    if request.share is not None:
        sentence += " or another --split"
    return sentence + ("" if request.which == "training" else ", or --eval-steps 0")


def split_bounds(split: str, num_sequences: int) -> list[tuple[int, int]]:
    """Sequence ranges of the shares of `--split`, rounded as Megatron-LM does.

    "969,30,1" over S sequences -> [(0, round(.969 S)), (round(.969 S), round(.999 S)), ...].
    """
    shares = [float(part) for part in split.split(",")]
    total = sum(shares)
    # Each share is normalised before they are summed up, as there: ties then round alike.
    cuts = accumulate((share / total for share in shares), initial=0.0)
    marks = [round(cut * num_sequences) for cut in cuts]
    return list(pairwise(marks))


def of_epochs(config: Config, mixture: Mixture) -> Config:
    """The configuration with the steps that `--num-epochs` comes to, if it is given.

    Samples that do not fill a global batch after the last epoch are left out.

    Raises:
        DataError: as `open_samples`, or the data does not fill one global batch.
    """
    epochs = config.train.num_epochs
    if not epochs:
        return config
    in_epochs = config.replace(data_order="epoch")
    request = _Request("training", None if config.data.train_data_path else 0, 0, 0)
    parts = [_open_part(in_epochs, part.corpus, request, None) for part in mixture.train]
    samples = epochs * sum(part.num_samples for part in parts)
    sizes = config.batch_sizes
    if samples < sizes.size(0):
        raise DataError(
            f"--num-epochs {epochs}: {counted(samples, 'sample')} cannot fill a "
            f"--global-batch-size of {sizes.size(0)}: give a smaller one, or more epochs"
        )
    # The last step that is filled ends before one more sample than there are.
    return with_steps(config, sizes.steps_for(samples + 1) - 1)
