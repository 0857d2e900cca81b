"""The configuration schema: what an experiment file may say, with types and defaults.

The dataclasses are the single source of truth. `mcit_lightning.loading` turns YAML files and command-line overrides into an
`ExperimentConfig`; nothing here imports torch, so that a wrong key is reported before anything heavy loads.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING


@dataclass
class BackboneConfig:
    """Which vision-language model is tuned, and how it is loaded."""

    id: str = MISSING
    """A local folder or a Hugging Face hub name that `AutoModelForImageTextToText` loads."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None is its default branch."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the frozen base. `auto`: bfloat16 where the precision is bf16-mixed, else float32."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Load the decoder's linears as nf4 or int8 (bitsandbytes, on a CUDA device); adapters stay in full precision."""
    attention: str | None = None
    """`sdpa`, `eager`, `flash_attention_2`, ...; None leaves the choice to transformers."""
    activation_checkpointing: bool = False
    """Recompute activations of the decoder (and of an adapted vision tower) in the backward pass."""
    compile: str | None = None
    """Backend of `torch.compile` for the decoder's layers in training, for example `inductor`; None computes without."""
    train_projector: bool = True
    """Tune the projector between the towers together with the adapters."""
    projector: str | None = None
    """Dotted path of the projector inside the model; None finds it for the known LLaVA-style families."""
    targets: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """Tower -> names for groups of its linears -> the ends of their paths, for example `vision: {attention: [qkv, proj]}`. A
    strategy's `targets` may say `attention` instead of a family's own names."""
    image_processor: dict[str, Any] = field(default_factory=dict)
    """Settings of the checkpoint's image processor that are changed, for example InternVL's `{max_patches: 6}` or Qwen-VL's
    `{size: {shortest_edge: 3136, longest_edge: 1003520}}` (pixels)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint. Never switched on by the framework."""


@dataclass
class PromptConfig:
    """How a conversation about images becomes the model's input. The same settings serve training and evaluation."""

    template: Literal["chat", "vicuna", "plain"] = "chat"
    """`chat`: the processor's own chat template; `vicuna`: Vicuna v1 as LLaVA-1.5 uses it; `plain`: question, newline, answer."""
    suffix: str = ""
    """Text appended to every question of evaluation rows, for example an answer-format instruction: on a line of its own, or
    behind the question if it begins with a blank. A question that ends with it already stays as it is."""
    pad_to_square: bool = False
    """Centre every image on a square of the processor's mean colour first, as LLaVA-1.5 does in training: nothing of a wide or
    tall image is then cropped, and box coordinates are fractions of that square."""


@dataclass
class DataConfig:
    """The stream of tasks: where the files are and how batches are made."""

    root: str = MISSING
    """Folder to which the tasks' paths are relative."""
    source: str = ""
    """Where the files can be had, in words; a dry run says it where files are missing."""
    annotations: str = "."
    """Folder of the tasks' files below `root`, for benchmarks that publish several sets of instructions. It counts where the
    tasks' paths name it: `train: "${data.annotations}/GQA/train.json"`."""
    batch_size: int = 8
    """Samples per device and training step."""
    eval_batch_size: int = 16
    """Samples per device and generation step; the answers do not depend on it."""
    num_workers: int = 0
    """Processes per device that read and encode samples ahead; 0 does it in the training process."""
    max_length: int = 2048
    """Tokens, image tokens included. A longer training sample loses the end of its text, never image tokens; one that has no
    answer token left is dropped from the loss. Both are counted and reported."""
    max_new_tokens: int = 32
    """Longest answer, in tokens, where the task names none."""
    group_by_length: bool = True
    """Put samples of similar length into the same batch."""
    feature_cache: Literal["never", "auto", "always"] = "never"
    """Keep the vision tower's outputs of pictures that are seen again (test rows, and training rows where a task has several
    epochs) on the disk, in the run directory's `features`, until the run is finished. `auto`: unless the strategy adapts the
    tower, or the model takes pictures in a form that does not allow it; `always` refuses then."""
    feature_cache_gb: float = 10.0
    """Most GiB of it, over all processes."""
    limit_train: int | None = None
    """Use at most this many rows of each task's training split (a seeded sample)."""
    limit_val: int | None = None
    """The same for the validation splits."""
    limit_test: int | None = None
    """The same for the test splits."""
    fraction: float = 1.0
    """Use this fraction of each training split (a seeded sample, after which `limit_train` applies)."""


@dataclass
class TaskConfig:
    """One task of the sequence. What is None falls back to `data` or `optim`."""

    aliases: list[str] = field(default_factory=list)
    """Other names that `order` and `tasks.<name>.<key>=` accept for the task. Case, `-` and `_` never count."""
    train: str | None = None
    """Training file relative to `data.root` (.json, .jsonl), or a Hugging Face dataset when `format` is `hf`."""
    val: str | None = None
    """Validation file; its loss is logged after every epoch. None: there is no validation."""
    test: str | None = None
    """Test file: rows of the benchmark's own test format, or training rows, whose answers are then the references."""
    images: str = ""
    """Folder, relative to `data.root`, to which the rows' image paths are relative."""
    test_images: str | None = None
    """The same for the test rows where their images lie elsewhere; None for the same folder."""
    format: Literal["auto", "json", "jsonl", "hf"] = "auto"
    """`auto` decides by the file's ending."""
    columns: dict[str, str] = field(default_factory=dict)
    """For `hf`: our field name (`id`, `image`, `question`, `answer`) to the dataset's column."""
    malformed: Literal["refuse", "skip"] = "refuse"
    """What becomes of a row that is not as its format asks: `refuse` ends the run before it starts; `skip` leaves it out, counts
    it and says so."""
    references: str | None = None
    """File, relative to `data.root`, with the answers to the test rows where the benchmark keeps them apart: COCO captions, VQA
    annotations, TextVQA's or DocVQA's `data`, GQA's questions, ScienceQA's problems, or test rows."""
    published_rows: dict[str, int] = field(default_factory=dict)
    """Split (`train`, `val`, `test`) to the number of rows that the benchmark's authors give. A dry run plans with it until the
    file is there; a file of another length is read all the same, and said."""
    metric: str = "exact_match"
    """Name of the metric that scores the answers, in percent."""
    metric_mode: Literal["fixed", "published"] = "fixed"
    """`published` scores as the benchmark's own script does, defects included (see the metric's docstring)."""
    metric_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the metric, for example `{tokenizer: words}` for captions."""
    epochs: int = 1
    """Passes over the training split."""
    batch_size: int | None = None
    """Samples per device and training step; None: `data.batch_size`."""
    lr: float | None = None
    """Learning rate of the language and vision groups for this task."""
    max_new_tokens: int | None = None
    """Longest answer in tokens; None: `data.max_new_tokens`."""
    min_new_tokens: int = 0
    """Shortest answer in tokens; some published scripts force captions to a length."""
    prompt_suffix: str | None = None
    """Text appended to every question of this task's evaluation rows; None: `prompt.suffix`."""


@dataclass
class OptimConfig:
    """AdamW with warm-up and cosine per stage, one named parameter group per tower."""

    lr: float = 2.0e-4
    """Language tower, and every group that names no rate of its own."""
    vision_lr: float | None = None
    """Adapters of the vision tower; None: `lr`."""
    projector_lr: float | None = None
    """The projector; None: `lr`."""
    strategy_lr: float | None = None
    """Routers and other parameters that the strategy owns."""
    weight_decay: float = 0.0
    """Of AdamW, on every trained parameter."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    warmup_ratio: float = 0.03
    """Share of a stage's optimizer steps in which the rate rises from zero."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up, over the rest of the stage."""


@dataclass
class ExperimentConfig:
    """A whole experiment: one backbone, one strategy, one sequence of tasks."""

    name: str = MISSING
    """Name of the run; its directory is `runs/<name>` unless `out` says otherwise."""
    seed: int = 42
    """Everything random is drawn from it: adapters, samples, order of the rows, noise."""
    out: str | None = None
    """Run directory; None means `runs/<name>`."""
    overwrite: bool = False
    """Start over in a run directory that holds a finished or different run (the old one is deleted). An interrupted run of this
    configuration continues all the same."""
    dry_run: bool = False
    """Print the plan (tasks, steps, adapters, memory, missing files) and stop: nothing is loaded, trained or written."""
    zero_shot: bool = True
    """Evaluate the pretrained model on every task before training."""
    evaluate: Literal["seen", "all"] = "seen"
    """Tasks evaluated after each stage. `all` also evaluates tasks still to come, for forward transfer."""
    imports: list[str] = field(default_factory=list)
    """Python modules to import first: your own files that register strategies or metrics."""
    prepare: dict[str, Any] | None = None
    """`{_target_: dotted.path, ...}`: called as `target(root=Path(data.root), ...)` on rank zero before anything loads."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    order: list[str] = field(default_factory=list)
    """Names of the tasks, in the order in which they are learnt."""
    held_out: list[str] = field(default_factory=list)
    """Further names of `tasks` that are evaluated with the pretrained model and after every stage and never trained: what the
    model could do before and must not lose (POPE, MME, ...). They are not part of the accuracy matrix and its summaries."""
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    """Name -> the task's files, metric and training; see below."""
    strategy: dict[str, Any] = field(default_factory=dict)
    """`name` and the hyper-parameters of that strategy's `Config`."""
    callbacks: list[dict[str, Any]] = field(default_factory=list)
    """`{_target_: callbacks.Name, ...}` each, in execution order."""
    loggers: list[dict[str, Any]] = field(default_factory=list)
    """Lightning loggers beside TensorBoard, for example `{_target_: lightning.pytorch.loggers.CSVLogger}`, or `WandbLogger` with
    its `project`. They write below `loggers/` in the run directory unless `save_dir` says otherwise."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Arguments of `lightning.Trainer`. `precision: auto` is bf16-mixed where the device computes in bfloat16, else 32-true."""
