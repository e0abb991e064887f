"""What a training job can be told: one section for each part of it.

The command line, the TOML reader, the help text and the validation (all in `options.py`) are
derived from these declarations and cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from annotated_types import Interval

from conda_dist.launch.job.optimizer_config import OptimizerConfig
from conda_dist.launch.job.section import (
    Count,
    Decay,
    Factor,
    HeldOut,
    Maybe,
    NotNegative,
    Positive,
    Section,
    Share,
    Size,
    SmallPositive,
    Texts,
)


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says which key and what to do."""


class ModelConfig(Section):
    """Shape of the network, in the names Hugging Face's model configs use."""

    architecture: Literal["llama", "gpt2"] = "llama"
    """LlamaForCausalLM or GPT2LMHeadModel"""
    hidden_size: Size = 192
    """width of the residual stream"""
    intermediate_size: Size = 512
    """width inside the MLP"""
    num_hidden_layers: Size = 4
    """number of blocks"""
    num_attention_heads: Size = 6
    """attention heads per block"""
    num_key_value_heads: Maybe[Size] = None
    """llama: key/value heads (default: as many as attention heads)"""
    rope_theta: Factor = 10000.0
    """llama: base of the rotary embedding"""
    rms_norm_eps: SmallPositive = 1e-6
    """llama: epsilon of the RMS norms"""
    dropout: Decay = 0.0
    """gpt2: dropout of embeddings, attention and residuals"""
    initializer_range: SmallPositive = 0.02
    """standard deviation of the initial weights"""
    tie_word_embeddings: bool = False
    """output head shares the embedding's weight"""


class TokenizerConfig(Section):
    """Byte-level BPE: trained once on the data and cached, or read from a file."""

    path: str = ""
    """a tokenizers JSON file to use instead of training one"""
    vocab_size: Annotated[int, Interval(ge=257, le=10_000_000)] = 4096
    """vocabulary to train, special token included"""
    sample_mb: Positive = 32.0
    """MB of text to train it on, from the start of the data"""
    end_of_text: str = "<|endoftext|>"
    """token put after each document"""


class DataConfig(Section):
    """Where the text comes from. Neither `path` nor `hf`: Python's own standard library."""

    path: Texts = ()
    """files, folders or globs: .txt .py .md .jsonl[.gz] .parquet"""
    hf: str = ""
    """a Hugging Face data set (name or folder)"""
    hf_config: str = ""
    """its configuration, e.g. en"""
    hf_revision: str = ""
    """its revision, such as refs/convert/parquet"""
    hf_split: str = "train"
    """its split to train on"""
    hf_val_split: str = ""
    """its validation split, val_fraction of hf_mb (default: of hf_split)"""
    hf_mb: Positive = 1000.0
    """MB of its text to take, from the start"""
    text_field: str = "text"
    """field or column of the text in JSONL, parquet and hf"""
    text_separator: str = ""
    r"""cuts plain-text files into documents, such as '\n\n' (default: one a file)"""
    val_fraction: HeldOut = 0.05
    """share of the documents held out for validation"""
    cache: str = ""
    """folder for tokens and tokenizers (default: ~/.cache/conda_dist)"""


class ScheduleConfig(Section):
    """Learning rate over time, as a factor of each optimizer's peak rate."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """shape after the warmup; linear falls to zero"""
    warmup_ratio: Share = 0.1
    """linear warmup from zero, as a share of all steps"""
    warmup_steps: Maybe[Count] = None
    """the same in steps, instead of the share"""
    min_lr_ratio: Share = 0.1
    """cosine: final rate as a share of the peak"""
    min_lr: Maybe[NotNegative] = None
    """cosine: final rate itself, instead of the share"""


class TrainingConfig(Section):
    """The loop: how much, how often, in which precision."""

    steps: Size = 600
    """optimizer steps"""
    seed: Count = 0
    """of the initial weights, the data order and dropout"""
    sequence_length: Annotated[Size, Interval(ge=2)] = 256
    """tokens per sequence"""
    global_batch_size: Size = 8
    """sequences per step over all ranks"""
    micro_batch_size: Size = 4
    """most sequences per rank and forward pass"""
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """type of forward and backward; auto: bfloat16 where it is fast"""
    hsdp_replicas: Size = 1
    """copies of the sharded model (HSDP); 1: plain FSDP"""
    lean_accumulation: bool = False
    """keep weights and gradients sharded between micro-batches: more communication"""
    activation_checkpointing: bool = False
    """recompute each block in the backward pass"""
    compile: bool = False
    """torch.compile each block"""
    skip_limit: Count = 3
    """bad steps in a row that are skipped before the job ends; 0: none"""
    skip_factor: NotNegative = 0.0
    """a step is bad also if loss or norm is so many spreads above the median of good steps; 0: only
    if it is not finite"""
    skip_window: Annotated[int, Interval(ge=1, le=1_000_000)] = 100
    """good steps whose median and spread skip_factor takes"""
    val_interval: Size = 50
    """steps between validations"""
    val_sequences: Size = 64
    """sequences in the fixed validation set"""
    timeout_s: Annotated[float, Interval(ge=1, le=1e7)] = 1800.0
    """seconds after which a stuck collective ends the job"""
    stall_timeout_s: Annotated[float, Interval(ge=0, le=1e7)] = 900.0
    """seconds one phase of a step may take on a rank, or a save; 0: any"""


class DeepSpeedConfig(Section):
    """What engine deepspeed does differently; the rest of the job is the same."""

    stage: Annotated[int, Interval(ge=0, le=3)] = 2
    """ZeRO: 0 shards nothing, 1 states, 2 gradients, 3 weights as well"""
    config: str = ""
    """a DeepSpeed JSON of further settings, such as zero_optimization's"""


class CheckpointConfig(Section):
    """When the whole state is saved, and how much of it is kept."""

    interval: Count = 200
    """steps between checkpoints; 0: only at the end"""
    keep: Size = 2
    """newest checkpoints kept"""


class MetricsConfig(Section):
    """What is written while training."""

    interval: Size = 1
    """steps between lines of metrics.jsonl"""
    console_interval: Size = 20
    """steps between printed lines where no bar can be drawn"""
    tensorboard: bool = True
    """write TensorBoard scalars"""


class Config(Section):
    """A whole job."""

    output: str = "runs/pretrain"
    """folder of everything the run writes (shared by all hosts)"""
    resume: str = ""
    """auto: the newest checkpoint in output, if any; or a checkpoint's path"""
    engine: Literal["fsdp2", "deepspeed"] = "fsdp2"
    """what shards the model and takes the steps"""
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()


def conflicts(config: Config) -> Iterator[str]:
    """What no single key's bounds can catch: keys that do not go together."""
    model, schedule, training = config.model, config.schedule, config.training
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    settings = config.optimizer.chosen
    if not config.output.strip():
        yield "output is empty: name the folder that the run writes into"
    if config.data.path and config.data.hf:
        yield "data.path and data.hf are both set: the text comes from one of them"
    if model.hidden_size % heads:
        yield (
            f"model.hidden_size {model.hidden_size} is not a multiple of "
            f"model.num_attention_heads {heads}"
        )
    if model.architecture == "llama":
        if kv_heads is not None and heads % kv_heads:
            yield (
                f"model.num_attention_heads {heads} is not a multiple of "
                f"model.num_key_value_heads {kv_heads}"
            )
        if model.dropout:
            yield "model.dropout has no effect with model.architecture llama: set it to 0"
        if model.hidden_size // heads % 2:
            yield (
                f"model.hidden_size {model.hidden_size} over model.num_attention_heads {heads} is "
                "an odd head size, which rotary embeddings cannot take: change one of them"
            )
    elif kv_heads is not None:
        yield "model.num_key_value_heads has no effect with model.architecture gpt2: remove it"
    if 0 < training.stall_timeout_s < 1:
        yield (
            f"training.stall_timeout_s {training.stall_timeout_s}: no phase of a step is that "
            "quick; give 0 (any time) or at least 1"
        )
    if (schedule.warmup_steps or 0) > training.steps:
        yield (
            f"schedule.warmup_steps {schedule.warmup_steps} is more than training.steps "
            f"{training.steps}, so the peak rate would never be reached: lower it"
        )
    if (schedule.min_lr or 0) > settings.lr:
        yield f"schedule.min_lr {schedule.min_lr} is above the peak rate {settings.lr}"
    if not settings.knows_shards and training.hsdp_replicas != 1:
        yield (
            f"training.hsdp_replicas has no effect with optimizer.name {config.optimizer.name}, "
            "whose model is replicated: set it to 1"
        )
    if config.engine == "deepspeed":
        for key, wrong, value in (
            (f"optimizer.name {config.optimizer.name}", not settings.under_zero, "conda or adamw"),
            ("training.hsdp_replicas", training.hsdp_replicas != 1, "1"),
            ("training.lean_accumulation", training.lean_accumulation, "false"),
            ("training.compile", training.compile, "false"),
        ):
            if wrong:
                yield (
                    f"{key} is not supported by engine deepspeed: set it to {value}, or engine "
                    "fsdp2"
                )
