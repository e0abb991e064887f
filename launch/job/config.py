"""What a training job can be told: one frozen dataclass per section.

Every key carries its own help line and bounds, so that the command line, the TOML reader, the
help text and the validation (all in `options.py`) are derived from the declarations below and
cannot drift apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from conda_dist.launch.job.key import LARGE, MOST, Key
from conda_dist.launch.job.optimizer_config import OptimizerConfig


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says which key and what to do."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of the network, in the names Hugging Face's model configs use."""

    architecture: Annotated[
        Literal["llama", "gpt2"], Key("LlamaForCausalLM or GPT2LMHeadModel")
    ] = "llama"
    hidden_size: Annotated[int, Key("width of the residual stream", ge=1, le=MOST)] = 192
    intermediate_size: Annotated[int, Key("width inside the MLP", ge=1, le=MOST)] = 512
    num_hidden_layers: Annotated[int, Key("number of blocks", ge=1, le=MOST)] = 4
    num_attention_heads: Annotated[int, Key("attention heads per block", ge=1, le=MOST)] = 6
    num_key_value_heads: Annotated[
        int | None,
        Key("llama: key/value heads (default: as many as attention heads)", ge=1, le=MOST),
    ] = None
    rope_theta: Annotated[float, Key("llama: base of the rotary embedding", ge=1, le=1e30)] = (
        10000.0
    )
    rms_norm_eps: Annotated[float, Key("llama: epsilon of the RMS norms", gt=0, le=1)] = 1e-6
    dropout: Annotated[
        float, Key("gpt2: dropout of embeddings, attention and residuals", ge=0, lt=1)
    ] = 0.0
    initializer_range: Annotated[
        float, Key("standard deviation of the initial weights", gt=0, le=1)
    ] = 0.02
    tie_word_embeddings: Annotated[bool, Key("output head shares the embedding's weight")] = False


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """Byte-level BPE: trained once on the data and cached, or read from a file."""

    path: Annotated[str, Key("a tokenizers JSON file to use instead of training one")] = ""
    vocab_size: Annotated[
        int, Key("vocabulary to train, special token included", ge=257, le=10_000_000)
    ] = 4096
    sample_mb: Annotated[
        float, Key("MB of text to train it on, from the start of the data", gt=0, le=LARGE)
    ] = 32.0
    end_of_text: Annotated[str, Key("token put after each document")] = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Where the text comes from. Neither `path` nor `hf`: Python's own standard library."""

    path: Annotated[
        tuple[str, ...], Key("files, folders or globs: .txt .py .md .jsonl[.gz] .parquet")
    ] = ()
    hf: Annotated[str, Key("a Hugging Face data set (name or folder)")] = ""
    hf_config: Annotated[str, Key("its configuration, e.g. en")] = ""
    hf_revision: Annotated[str, Key("its revision, such as refs/convert/parquet")] = ""
    hf_split: Annotated[str, Key("its split to train on")] = "train"
    hf_val_split: Annotated[
        str, Key("its validation split, val_fraction of hf_mb (default: of hf_split)")
    ] = ""
    hf_mb: Annotated[float, Key("MB of its text to take, from the start", gt=0, le=LARGE)] = 1000.0
    text_field: Annotated[str, Key("field or column of the text in JSONL, parquet and hf")] = "text"
    text_separator: Annotated[
        str, Key(r"cuts plain-text files into documents, such as '\n\n' (default: one a file)")
    ] = ""
    val_fraction: Annotated[
        float, Key("share of the documents held out for validation", gt=0, lt=1)
    ] = 0.05
    cache: Annotated[
        str, Key("folder for tokens and tokenizers (default: ~/.cache/conda_dist)")
    ] = ""


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """Learning rate over time, as a factor of each optimizer's peak rate."""

    name: Annotated[
        Literal["cosine", "linear", "constant"], Key("shape after the warmup; linear falls to zero")
    ] = "cosine"
    warmup_ratio: Annotated[
        float, Key("linear warmup from zero, as a share of all steps", ge=0, le=1)
    ] = 0.1
    warmup_steps: Annotated[int | None, Key("the same in steps, instead of the share", ge=0)] = None
    min_lr_ratio: Annotated[float, Key("cosine: final rate as a share of the peak", ge=0, le=1)] = (
        0.1
    )
    min_lr: Annotated[
        float | None, Key("cosine: final rate itself, instead of the share", ge=0)
    ] = None


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """The loop: how much, how often, in which precision."""

    steps: Annotated[int, Key("optimizer steps", ge=1, le=MOST)] = 600
    seed: Annotated[int, Key("of the initial weights, the data order and dropout", ge=0)] = 0
    sequence_length: Annotated[int, Key("tokens per sequence", ge=2, le=MOST)] = 256
    global_batch_size: Annotated[int, Key("sequences per step over all ranks", ge=1, le=MOST)] = 8
    micro_batch_size: Annotated[
        int, Key("most sequences per rank and forward pass", ge=1, le=MOST)
    ] = 4
    compute_dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        Key("type of forward and backward; auto: bfloat16 where it is fast"),
    ] = "auto"
    hsdp_replicas: Annotated[
        int, Key("copies of the sharded model (HSDP); 1: plain FSDP", ge=1, le=MOST)
    ] = 1
    lean_accumulation: Annotated[
        bool, Key("keep weights and gradients sharded between micro-batches: more communication")
    ] = False
    activation_checkpointing: Annotated[bool, Key("recompute each block in the backward pass")] = (
        False
    )
    compile: Annotated[bool, Key("torch.compile each block")] = False
    skip_limit: Annotated[
        int,
        Key("bad steps in a row that are skipped before the job ends; 0: none", ge=0, le=MOST),
    ] = 3
    skip_factor: Annotated[
        float,
        Key(
            "a step is bad also if loss or norm is so many spreads above the median of good steps; "
            "0: only if it is not finite",
            ge=0,
            le=LARGE,
        ),
    ] = 0.0
    skip_window: Annotated[
        int, Key("good steps whose median and spread skip_factor takes", ge=1, le=1_000_000)
    ] = 100
    val_interval: Annotated[int, Key("steps between validations", ge=1, le=MOST)] = 50
    val_sequences: Annotated[int, Key("sequences in the fixed validation set", ge=1, le=MOST)] = 64
    timeout_s: Annotated[
        float, Key("seconds after which a stuck collective ends the job", ge=1, le=1e7)
    ] = 1800.0
    stall_timeout_s: Annotated[
        float,
        Key("seconds one phase of a step may take on a rank, or a save; 0: any", ge=0, le=1e7),
    ] = 900.0


@dataclass(frozen=True, slots=True)
class DeepSpeedConfig:
    """What engine deepspeed does differently; the rest of the job is the same."""

    stage: Annotated[
        int, Key("ZeRO: 0 shards nothing, 1 states, 2 gradients, 3 weights as well", ge=0, le=3)
    ] = 2
    config: Annotated[
        str, Key("a DeepSpeed JSON of further settings, such as zero_optimization's")
    ] = ""


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """When the whole state is saved, and how much of it is kept."""

    interval: Annotated[int, Key("steps between checkpoints; 0: only at the end", ge=0)] = 200
    keep: Annotated[int, Key("newest checkpoints kept", ge=1)] = 2


@dataclass(frozen=True, slots=True)
class MetricsConfig:
    """What is written while training."""

    interval: Annotated[int, Key("steps between lines of metrics.jsonl", ge=1)] = 1
    console_interval: Annotated[
        int, Key("steps between printed lines where no bar can be drawn", ge=1)
    ] = 20
    tensorboard: Annotated[bool, Key("write TensorBoard scalars")] = True


@dataclass(frozen=True, slots=True)
class Config:
    """A whole job."""

    output: Annotated[str, Key("folder of everything the run writes (shared by all hosts)")] = (
        "runs/pretrain"
    )
    resume: Annotated[
        str, Key("auto: the newest checkpoint in output, if any; or a checkpoint's path")
    ] = ""
    engine: Annotated[
        Literal["fsdp2", "deepspeed"], Key("what shards the model and takes the steps")
    ] = "fsdp2"
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def __post_init__(self) -> None:
        """Refuses combinations that no single key's bounds can catch."""
        for wrong, message in _conflicts(self):
            if wrong:
                raise ConfigError(message)


def _conflicts(config: Config) -> list[tuple[bool, str]]:
    """Pairs of (is it wrong, what to say), for rules that span several keys."""
    model, data, schedule = config.model, config.data, config.schedule
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    peak = config.optimizer.chosen.lr
    return [
        (not config.output.strip(), "output is empty: name the folder that the run writes into"),
        (
            bool(data.path) and bool(data.hf),
            "data.path and data.hf are both set: the text comes from one of them",
        ),
        (
            model.hidden_size % heads != 0,
            f"model.hidden_size {model.hidden_size} is not a multiple of "
            f"model.num_attention_heads {heads}",
        ),
        (
            kv_heads is not None and heads % kv_heads != 0,
            f"model.num_attention_heads {heads} is not a multiple of "
            f"model.num_key_value_heads {kv_heads}",
        ),
        (
            model.architecture == "llama" and model.dropout != 0,
            f"model.dropout {model.dropout} has no effect with model.architecture llama: set it "
            "to 0",
        ),
        (
            model.architecture == "gpt2" and kv_heads is not None,
            "model.num_key_value_heads has no effect with model.architecture gpt2: remove it",
        ),
        (
            model.architecture == "llama" and model.hidden_size // heads % 2 != 0,
            f"model.hidden_size {model.hidden_size} over model.num_attention_heads {heads} is an "
            "odd head size, which rotary embeddings cannot take: change one of them",
        ),
        (
            0 < config.training.stall_timeout_s < 1,
            f"training.stall_timeout_s {config.training.stall_timeout_s}: no phase of a step is "
            "that quick; give 0 (any time) or at least 1",
        ),
        (
            (schedule.warmup_steps or 0) > config.training.steps,
            f"schedule.warmup_steps {schedule.warmup_steps} is more than training.steps "
            f"{config.training.steps}, so the peak rate would never be reached: lower it",
        ),
        (
            schedule.min_lr is not None and schedule.min_lr > peak,
            f"schedule.min_lr {schedule.min_lr} is above the peak rate {peak}",
        ),
        (
            not config.optimizer.chosen.knows_shards and config.training.hsdp_replicas != 1,
            f"training.hsdp_replicas has no effect with optimizer.name {config.optimizer.name}, "
            "whose model is replicated: set it to 1",
        ),
        *(_deepspeed_conflicts(config) if config.engine == "deepspeed" else []),
    ]


def _deepspeed_conflicts(config: Config) -> list[tuple[bool, str]]:
    """What FSDP2 does and the other engine does not."""
    training, name = config.training, config.optimizer.name
    found = {
        f"optimizer.name {name}": (name not in ("conda", "adamw"), "conda or adamw"),
        "training.hsdp_replicas": (training.hsdp_replicas != 1, "1"),
        "training.lean_accumulation": (training.lean_accumulation, "false"),
        "training.compile": (training.compile, "false"),
    }
    return [
        (wrong, f"{key} is not supported by engine deepspeed: set it to {value}, or engine fsdp2")
        for key, (wrong, value) in found.items()
    ]
