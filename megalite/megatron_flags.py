"""Megatron-LM's long flags: what each one means here.

A flag that people have in their hands either sets one of our fields, or asks for what megalite
always does, or is refused with one sentence. None is ignored.
`docs/megatron_flags.md` is this table in words, with every default that differs.
No torch import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megalite.config import Config


@dataclass(frozen=True)
class Alias:
    """The flag sets `field` to its own value, or to `value` if it takes none."""

    field: str
    value: str | None = None


@dataclass(frozen=True)
class Always:
    """The flag asks for what megalite does anyway; other `values` are refused.

    Attributes:
        values: what may be given; empty if the flag takes no value.
        why: what megalite does.
    """

    why: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refused:
    """The flag has no equal here; `why` is the sentence that says so, and what to do."""

    why: str


@dataclass(frozen=True)
class With:
    """The flag adds nothing if `field` is given, and is refused if it is not: `why`."""

    field: str
    why: str


@dataclass(frozen=True)
class Follows:
    """The flag sets `field` to what follows from its own number and the rest of the configuration.

    Attributes:
        needs: fields of the rest that are looked at.
        of: from both to the field's value; raises ValueError with what to do.
    """

    field: str
    needs: tuple[str, ...]
    of: Callable[[Config, int], int]


MegatronFlag = Alias | Always | Follows | Refused | With


def chunks_of_layers(config: Config, layers_per_stage: int) -> int:
    """Stages of each pipeline rank, if every stage has so many layers.

    Raises:
        ValueError: the layers of the model do not make whole numbers of such stages.
    """
    layers, pp = config.model.num_layers, config.parallel.pp
    if layers < 1 or pp < 1:
        return 0  # told by the rules about these
    if layers % pp:
        raise ValueError(
            f"--num-layers {layers} is no multiple of --pp {pp}: give --chunks, and --pp-layers if "
            "they are not to be balanced"
        )
    of_rank = layers // pp
    if layers_per_stage < 1 or of_rank % layers_per_stage:
        fit = [n for n in range(1, min(of_rank, 1000) + 1) if of_rank % n == 0]
        nearest = sorted(sorted(fit, key=lambda n: abs(n - layers_per_stage))[:2])
        raise ValueError(
            f"it does not divide the {of_rank} layers of a rank, --num-layers {layers} / --pp {pp};"
            f" try {' or '.join(map(str, nearest))}"
        )
    return of_rank // layers_per_stage


_CHECKPOINTS = "checkpoints have one format: safetensors files and a manifest; leave it out"
_SAMPLES = "lengths are given in steps (--train-iters) or --tokens"
_SPECIAL_TOKENS = "special tokens are those of the tokenizer's files and --tiktoken-pattern"
_FRAGMENTS = "fill-in-the-middle cuts whole documents, not parts of them; leave it out"
_EXPERTS = "there are no experts: megalite trains dense LLaMA models"
_PROFILER = "there is no built-in profiler"
_LOGS = "scalars go to runs/<name>/metrics.jsonl, and to TensorBoard there if it is installed"

MEGATRON_FLAGS: Mapping[str, MegatronFlag] = MappingProxyType(
    {
        # Model
        "--num-query-groups": Alias("num_kv_heads"),
        "--num-key-value-heads": Alias("num_kv_heads"),
        "--group-query-attention": With(
            "num_kv_heads",
            "the number of groups says it all: give --num-query-groups (Megatron-LM takes 1 if it "
            "is left out)",
        ),
        "--kv-channels": Alias("head_dim"),
        "--rotary-base": Alias("rope_theta"),
        "--rotary-position-embeddings-theta": Alias("rope_theta"),
        "--rotary-percent": Always("RoPE turns every feature", ("1.0", "1")),
        "--use-rope-scaling": Alias("rope_scaling", "llama3"),
        "--position-embedding-type": Always("positions are rotary", ("rope",)),
        "--use-rotary-position-embeddings": Always("positions are rotary"),
        "--max-position-embeddings": Refused(
            "RoPE has no table of positions; --seq-length alone counts"
        ),
        "--swiglu": Always("the MLP is SwiGLU"),
        "--normalization": Always("norms are RMSNorm", ("RMSNorm", "rmsnorm")),
        "--layernorm-epsilon": Alias("norm_epsilon"),
        "--disable-bias-linear": Always("there are no biases"),
        "--untie-embeddings-and-output-weights": Alias("tie_embeddings", "false"),
        "--attention-backend": Always("PyTorch's SDPA takes the fastest back end", ("auto",)),
        "--use-flash-attn": Always("PyTorch's SDPA takes flash attention where it can"),
        "--transformer-impl": Always("the layers are megalite's own", ("local",)),
        "--attention-softmax-in-fp32": Always("softmax statistics are fp32"),
        "--no-masked-softmax-fusion": Refused("softmax is part of the attention kernel"),
        "--num-experts": Refused(_EXPERTS),
        "--expert-model-parallel-size": Always(_EXPERTS, ("1",)),
        # Layout
        "--tensor-model-parallel-size": Alias("tp"),
        "--pipeline-model-parallel-size": Alias("pp"),
        "--context-parallel-size": Always("there is no context parallelism", ("1",)),
        "--num-virtual-stages-per-pipeline-rank": Alias("chunks"),
        "--num-layers-per-virtual-pipeline-stage": Follows(
            "chunks", ("num_layers", "pp"), chunks_of_layers
        ),
        # Of the zero-bubble fork, github.com/sail-sg/zero-bubble-pipeline-parallelism.
        "--enable-zbh1-pipeline": Alias("schedule", "zb-h1"),
        "--zero-bubble-v-schedule": Alias("schedule", "zb-v"),
        "--zero-bubble-v-schedule-mem-setup": Refused(
            "each is a schedule of its own: --schedule zb-v, v-half or v-min"
        ),
        "--enable-zero-bubble": Refused("give --schedule zb-h1, or zb-h2 for twice the memory"),
        "--decoder-first-pipeline-num-layers": Refused("give all stages with --pp-layers N,N,..."),
        "--decoder-last-pipeline-num-layers": Refused("give all stages with --pp-layers N,N,..."),
        "--use-distributed-optimizer": Alias("zero", "1"),
        "--use-torch-fsdp2": Alias("zero", "3"),
        "--optimizer-cpu-offload": Alias("offload_optimizer", "true"),
        "--use-megatron-fsdp": Alias("zero", "3"),
        "--data-parallel-sharding-strategy": Refused(
            "give --zero 0, 1, 2 or 3 for no_shard, optim, optim_grads or optim_grads_params"
        ),
        "--num-distributed-optimizer-instances": Refused(
            "give the data ranks of each instance with --zero-shard-size"
        ),
        "--overlap-grad-reduce": Always("gradient buckets are reduced during the last backward"),
        "--overlap-param-gather": Always(
            "what a data rank has updated is gathered while the next forward runs"
        ),
        "--tp-comm-overlap": Refused(
            "it needs Transformer Engine; the reduction of input gradients overlaps anyway"
        ),
        "--distributed-backend": Refused("it follows from --device: NCCL on GPUs, gloo on CPUs"),
        # Batch, length, optimizer
        "--train-iters": Alias("steps"),
        "--train-samples": Refused(_SAMPLES),
        "--muon-num-ns-steps": Always("Muon takes five steps of Newton and Schulz", ("5",)),
        "--muon-scale-mode": Always(
            "Muon's updates are 0.2 sqrt(max(rows, columns)) long", ("spectral",)
        ),
        "--muon-extra-scale-factor": Always(
            "Muon's updates are 0.2 sqrt(max(rows, columns)) long", ("0.2",)
        ),
        "--muon-tp-mode": Always("Muon takes whole matrices over tensor ranks", ("duplicated",)),
        "--lr-warmup-iters": Alias("lr_warmup_steps"),
        "--lr-decay-iters": Alias("lr_decay_steps"),
        "--lr-wsd-decay-iters": Alias("lr_wsd_decay_steps"),
        "--lr-warmup-samples": Refused(_SAMPLES),
        "--lr-decay-samples": Refused(_SAMPLES),
        "--eval-iters": Alias("eval_steps"),
        # Precision and memory
        "--bf16": Alias("precision", "bf16"),
        "--fp16": Alias("precision", "fp16"),
        "--grad-reduce-in-bf16": Alias("grad_reduce_dtype", "bf16"),
        "--accumulate-allreduce-grads-in-fp32": Always("gradients are summed in fp32"),
        "--use-precision-aware-optimizer": Refused("give --moments-dtype bf16"),
        "--exp-avg-dtype": Refused("both moments have one precision: give --moments-dtype"),
        "--exp-avg-sq-dtype": Refused("both moments have one precision: give --moments-dtype"),
        "--main-grads-dtype": Refused(
            "gradients add up in fp32; give --grad-reduce-dtype for what travels between data ranks"
        ),
        "--no-gradient-accumulation-fusion": Refused("gradient accumulation is not fused"),
        "--recompute-activations": Alias("recompute", "selective"),
        "--recompute-granularity": Alias("recompute"),
        "--recompute-method": Always("full recomputation works layer by layer", ("uniform",)),
        "--recompute-num-layers": Always("full recomputation works layer by layer", ("1",)),
        "--recompute-modules": Refused("selective recomputation is that of the attention core"),
        # Data
        "--data-path": Alias("data"),
        "--tokenizer-special-tokens": Refused(_SPECIAL_TOKENS),
        "--vocab-extra-ids": Refused(_SPECIAL_TOKENS),
        "--tokenizer-hf-include-special-tokens": Always(
            "what tokenizer.json puts around a text is put there"
        ),
        "--trust-remote-code": Refused("a tokenizer is a file of data; no code is loaded"),
        "--per-split-data-args-path": Refused(
            "give --train-data-path, --valid-data-path, --test-data-path"
        ),
        "--full-validation": Refused("give the batches of a validation with --eval-steps"),
        "--fim-data": With(
            "fim_rate",
            "the rate says it all: give --fim-rate (Megatron-LM takes 0.5 if it is left out)",
        ),
        "--fim-pad-token": Refused("what fills a sample up never counts in the loss; leave it out"),
        "--fim-eod-token": Refused("a document ends as the tokenizer ends it; leave it out"),
        "--fim-split-sample": Refused(_FRAGMENTS),
        "--fim-fragment-rate": Refused(_FRAGMENTS),
        "--fim-no-prefix": Refused("fill-in-the-middle leaves out no text; leave it out"),
        "--num-workers": Refused(
            "the loader maps the corpus into memory and needs no workers; leave it out"
        ),
        "--dataloader-type": Always(
            "samples are read in the order that --data-order says, one pass after the other",
            ("single",),
        ),
        # Checkpoints, logs
        "--ckpt-format": Refused(_CHECKPOINTS),
        "--auto-detect-ckpt-format": Refused(_CHECKPOINTS),
        "--use-checkpoint-args": Refused(
            "a checkpoint knows its run; take its config.json as a configuration file"
        ),
        "--no-load-rng": Refused(
            "random numbers follow from --seed and the step; there is no state of theirs"
        ),
        "--exit-interval": Refused("--train-iters ends a run"),
        "--exit-duration-in-mins": Refused("--train-iters ends a run"),
        "--exit-signal-handler": Always("SIGTERM stops all ranks in order, after the same step"),
        "--log-throughput": Always("every line shows tokens/s, and MFU on a GPU"),
        "--tensorboard-dir": Refused(_LOGS),
        "--wandb-project": Refused(_LOGS),
        "--wandb-exp-name": Refused(_LOGS),
        "--timing-log-level": Refused(_LOGS),
        "--profile": Refused(_PROFILER),
        "--profile-step-start": Refused(_PROFILER),
        "--profile-step-end": Refused(_PROFILER),
        "--use-pytorch-profiler": Refused(_PROFILER),
        # Others
        "--use-mcore-models": Always("there is one implementation of each model"),
        "--fp8-format": Refused("there is no fp8; use --bf16"),
        "--start-weight-decay": Refused("the weight decay is constant: --weight-decay"),
        "--end-weight-decay": Refused("the weight decay is constant: --weight-decay"),
        "--weight-decay-incr-style": Refused("the weight decay is constant: --weight-decay"),
        "--no-rope-fusion": Refused("which kernel turns positions is chosen at start"),
        "--no-bias-swiglu-fusion": Refused("which kernel runs SwiGLU is chosen at start"),
        "--cross-entropy-loss-fusion": Refused("the cross-entropy has one implementation"),
        "--no-save-optim": Refused("a checkpoint is whole; leave --save out for weights alone"),
        "--no-save-rng": Always("random numbers follow from --seed and the step"),
        "--manual-gc": Refused("Python collects its garbage as it does by default"),
        "--deterministic-mode": Alias("deterministic", "true"),
    }
)

MEGATRON_VALUES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {"--optimizer": MappingProxyType({"adam": "adamw"})}
)
"""Of flags that both have: Megatron-LM's words, and ours."""
