"""The fields that describe the model. No torch import."""

from __future__ import annotations

from dataclasses import dataclass

from megalite.option import option


@dataclass(frozen=True)
class ModelConfig:
    """The model: shape, positions, initial values, dropout."""

    model: str = option(
        "tiny",
        "Preset that every other value starts from; or a folder, for the model of the config.json "
        "in it (a Hugging Face LLaMA's).",
        metavar="NAME",
    )
    num_layers: int = option(4, "Transformer layers of the whole model.", metavar="LAYERS")
    hidden_size: int = option(128, "Width of the residual stream.", metavar="FEATURES")
    num_attention_heads: int = option(4, "Query heads.", metavar="HEADS")
    num_kv_heads: int = option(
        0, "Key/value heads (grouped-query attention). 0: as many as query heads.", metavar="HEADS"
    )
    head_dim: int = option(
        0, "Features of a head. 0: hidden size / query heads.", metavar="FEATURES"
    )
    ffn_hidden_size: int = option(352, "Width of the SwiGLU MLP.", metavar="FEATURES")
    vocab_size: int = option(0, "Vocabulary. 0: the tokenizer's.", metavar="TOKENS")
    make_vocab_size_divisible_by: int = option(
        128, "The vocabulary is padded to a multiple of this times tp.", metavar="TOKENS"
    )
    seq_length: int = option(128, "Length of a training sample.", metavar="TOKENS")
    tie_embeddings: bool = option(False, "Share one matrix between the embedding and the head.")
    norm_epsilon: float = option(1e-5, "Added to the mean square in RMSNorm.", metavar="X")
    rope_theta: float = option(10000.0, "Base of the rotary frequencies.", metavar="X")
    rope_scaling: str = option(
        "none",
        "Rotary frequencies beyond the trained length.",
        choices=("none", "linear", "llama3", "yarn"),
    )
    rope_scaling_factor: float = option(
        8.0, "Any scaling: how many times longer than first trained.", metavar="X"
    )
    rope_low_freq_factor: float = option(1.0, "llama3 scaling: low frequency factor.", metavar="X")
    rope_high_freq_factor: float = option(
        4.0, "llama3 scaling: high frequency factor.", metavar="X"
    )
    rope_original_seq_length: int = option(
        8192,
        "llama3 and yarn scaling: length the model was first trained at.",
        metavar="TOKENS",
    )
    rope_yarn_beta_fast: float = option(
        32.0,
        "yarn scaling: features that turn more often than this within the original length are "
        "kept.",
        metavar="TURNS",
    )
    rope_yarn_beta_slow: float = option(
        1.0,
        "yarn scaling: features that turn less often are divided by the factor.",
        metavar="TURNS",
    )
    rope_yarn_attention_factor: float = option(
        0.0,
        "yarn scaling: what turned queries and keys are multiplied by. 0: 0.1 ln(factor) + 1.",
        metavar="X",
    )
    init_method_std: float = option(
        0.02,
        "Standard deviation of initial weights; output projections get it / sqrt(2 x layers).",
        metavar="X",
    )
    hidden_dropout: float = option(
        0.0, "Probability to drop a feature of an embedding, attention or MLP output.", metavar="P"
    )
    attention_dropout: float = option(
        0.0, "Probability to drop an attention weight (takes an unfused path).", metavar="P"
    )

    @property
    def qkv_features(self) -> int:
        """Output features of the q, k and v projections together."""
        return (self.num_attention_heads + 2 * self.num_kv_heads) * self.head_dim

    def padded_vocab_size(self, tp: int) -> int:
        """Vocabulary rounded up so that every tensor rank holds an equal share [tokens]."""
        multiple = self.make_vocab_size_divisible_by * tp
        return -(-self.vocab_size // multiple) * multiple
