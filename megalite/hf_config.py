"""A model's fields from Hugging Face's `config.json` of a LLaMA, and back. No torch import.

What the file asks for and this model is not is refused by name: a model that is read as another
one trains and speaks nonsense without an error. Positions are said in two ways: transformers 4
reads `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`. Both are read, and have to
agree; both are written.

Source: transformers' `LlamaConfig` and `modeling_rope_utils`, of 4.57 and 5.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megalite.config_model import ModelConfig
from megalite.errors import ConfigError, DamagedError

NAME = "config.json"
LONGEST_JSON_BYTES = 64 << 20
MOST_LAYERS = 10_000
"""No model has more: a hostile file's number would be a list of so many tensors."""
ARCHITECTURE = "LlamaForCausalLM"

SHAPE = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_kv_heads", "head_dim"),
    *("ffn_hidden_size", "vocab_size", "tie_embeddings"),
)
"""Fields that say which tensors there are, and their shapes."""

_ROPE: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "default": {},
        "linear": {"factor": "rope_scaling_factor"},
        "llama3": {
            "factor": "rope_scaling_factor",
            "low_freq_factor": "rope_low_freq_factor",
            "high_freq_factor": "rope_high_freq_factor",
            "original_max_position_embeddings": "rope_original_seq_length",
        },
        "yarn": {
            "factor": "rope_scaling_factor",
            "original_max_position_embeddings": "rope_original_seq_length",
            "beta_fast": "rope_yarn_beta_fast",
            "beta_slow": "rope_yarn_beta_slow",
            "attention_factor": "rope_yarn_attention_factor",
        },
    }
)
"""Of each kind of positions, its numbers there and the fields that they are here."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "model_type": ("llama",),
        "architectures": ([ARCHITECTURE], None),
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "sliding_window": (None,),
        "partial_rotary_factor": (1, None),
        "original_max_position_embeddings": (None,),
        "quantization_config": (None,),
        "auto_map": (None,),
        "num_experts": (None,),
        "num_local_experts": (None,),
    }
)
"""The values that ask for nothing that this model is not; without a key it asks for nothing."""

_NEUTRAL_ROPE: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "partial_rotary_factor": (1, None),
        "mscale": (None,),
        "mscale_all_dim": (None,),
        "truncate": (True, None),
        "attention_factor": (None,),
        "beta_fast": (None,),
        "beta_slow": (None,),
    }
)


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Fields of `ModelConfig` that a folder's config.json sets.

    A training sample is as long as the model was first trained at: with the scalings llama3 and
    yarn their original length, otherwise `max_position_embeddings`.

    Raises:
        ConfigError: it is missing, or asks for what this model is not; all of it at once.
        DamagedError: it is no JSON, or says something impossible.
    """
    path = folder / NAME
    if not os.path.lexists(path):
        raise ConfigError(
            f"{folder} has no {NAME}: give the folder of a Hugging Face model (nothing is "
            "downloaded), or read a checkpoint by --load"
        )
    content = read_json(path)
    if "model_type" not in content:
        raise DamagedError(f"{path} has no model_type: it is no model of Hugging Face's")
    problems = [
        f"{path}: {key} {json.dumps(content[key])} is not in megalite, which trains "
        f"{ARCHITECTURE} with {key} {json.dumps(neutral[0])}"
        for key, neutral in _NEUTRAL.items()
        if key in content and not _is_one_of(content[key], neutral)
    ]
    if problems:
        raise ConfigError(problems)
    take = _Numbers(path, content)
    heads, hidden = take.count("num_attention_heads"), take.count("hidden_size")
    length = take.count("max_position_embeddings", 2048)
    rope = _rope(path, content, length)
    return {
        "num_layers": take.count("num_hidden_layers", most=MOST_LAYERS),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_kv_heads": take.count("num_key_value_heads", heads),
        "head_dim": take.count("head_dim", max(1, hidden // heads)),
        "ffn_hidden_size": take.count("intermediate_size"),
        "vocab_size": take.count("vocab_size"),
        "seq_length": rope.get("rope_original_seq_length", length),
        "tie_embeddings": take.switch("tie_word_embeddings"),
        "norm_epsilon": take.number("rms_norm_eps", 1e-6),
        "init_method_std": take.number("initializer_range", 0.02),
        "attention_dropout": take.number("attention_dropout", 0.0),
        **rope,
    }


def to_hf_config(
    model: ModelConfig, dtype: str, bos: int | None, eos: int | None
) -> dict[str, Any]:
    """The content of config.json.

    `max_position_embeddings` is the length of training samples, or with the scalings llama3 and
    yarn what they reach, factor x original length, if that is more.

    Args:
        model: resolved.
        dtype: as torch calls it: `bfloat16`.
        bos, eos: tokens that begin and end a text; None: not known.
    """
    kind = "default" if model.rope_scaling == "none" else model.rope_scaling
    scaling = {"rope_type": kind}
    for key, field in _ROPE[kind].items():
        if value := getattr(model, field):
            scaling[key] = value
    reach = model.seq_length
    if "original_max_position_embeddings" in scaling:
        reach = max(reach, round(model.rope_scaling_factor * model.rope_original_seq_length))
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "dtype": dtype,
        "torch_dtype": dtype,  # its name before transformers 4.56
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": reach,
        "initializer_range": model.init_method_std,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": model.attention_dropout,
        "mlp_bias": False,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "rope_theta": model.rope_theta,
        "rope_scaling": None if kind == "default" else scaling,
        "rope_parameters": {"rope_theta": model.rope_theta, **scaling},
    }


def read_json(path: Path) -> dict[str, Any]:
    """The names and values of a JSON file, each name once.

    Raises:
        DamagedError: it can't be read, or holds something else.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise DamagedError(f"{path} is damaged: it has {twice!r} twice")
        return found

    try:
        if path.stat().st_size > LONGEST_JSON_BYTES:
            raise DamagedError(f"{path} has more than {LONGEST_JSON_BYTES} bytes")
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except OSError as error:
        raise DamagedError(f"{path} can't be read: {error.strerror}") from None
    except DamagedError:
        raise
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise DamagedError(f"{path} holds no names and values")
    return content


class _Numbers:
    """Values of a JSON object, of the kind that they ought to be; null is as good as missing.

    Raises:
        DamagedError: one is of another kind, or missing and needed.
    """

    def __init__(self, path: Path, content: Mapping[str, Any]):
        self._path, self._content = path, content

    def count(self, key: str, default: int = 0, most: int = 1 << 31) -> int:
        """A whole number from 1 to `most`; without a default it has to be there."""
        value = self._value(key, default or None)
        if type(value) is not int or not 0 < value <= most:
            raise DamagedError(
                f"{self._path}: {key} {json.dumps(value)} is no whole number from 1 to {most}"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number; without a default it has to be there."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise DamagedError(f"{self._path}: {key} {json.dumps(value)} is no number")
        return float(value)

    def switch(self, key: str) -> bool:
        """True or false, which is the default."""
        value = self._value(key, False)
        if not isinstance(value, bool):
            raise DamagedError(f"{self._path}: {key} {json.dumps(value)} is not true or false")
        return value

    def _value(self, key: str, default: Any) -> Any:
        value = self._content.get(key)
        if value is None and default is None:
            raise DamagedError(f"{self._path} has no {key}")
        return default if value is None else value


def _rope(path: Path, content: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Fields of positions."""
    said = dict(_said_of_rope(path, content))
    kind = said.pop("rope_type", "default")
    theta = _Numbers(path, said).number("rope_theta", 10000.0)
    said.pop("rope_theta", None)
    if not isinstance(kind, str) or kind not in _ROPE:
        raise ConfigError(
            f"{path}: rope_type {json.dumps(kind)} is not in megalite; there are {', '.join(_ROPE)}"
        )
    names = _ROPE[kind]
    for key, value in said.items():
        if key not in names and not _is_one_of(value, _NEUTRAL_ROPE.get(key, ())):
            raise ConfigError(
                f"{path}: {key} {json.dumps(value)} of rope_type {kind} is not in megalite"
            )
    take = _Numbers(path, said)
    fields: dict[str, Any] = {
        "rope_theta": theta,
        "rope_scaling": "none" if kind == "default" else kind,
    }
    defaults = ModelConfig()
    for key, field in names.items():
        if key == "original_max_position_embeddings":
            fields[field] = take.count(key, length)
        else:
            is_needed = not field.startswith("rope_yarn")
            fields[field] = take.number(key, None if is_needed else getattr(defaults, field))
    return fields


def _said_of_rope(path: Path, content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What the file says of positions, whichever way; under a name of today, each once."""
    said: dict[str, tuple[str, Any]] = {}
    for place in ("rope_theta", "rope_scaling", "rope_parameters"):
        values = content.get(place)
        if values is None:
            continue
        if place == "rope_theta":
            values = {"rope_theta": values}
        if not isinstance(values, dict):
            raise DamagedError(f"{path}: {place} {json.dumps(values)} holds no names and values")
        for key, value in values.items():
            name = "rope_type" if key == "type" else key
            other, known = said.setdefault(name, (place, value))
            if known != value:
                raise ConfigError(
                    f"{path}: {name} is {json.dumps(known)} in {other} and {json.dumps(value)} in "
                    f"{place}: versions of transformers would read it differently"
                )
    for name, (_, value) in said.items():
        yield name, value


def _is_one_of(value: Any, choices: tuple[Any, ...]) -> bool:
    """JSON's true is not 1 here."""
    return any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in choices
    )
