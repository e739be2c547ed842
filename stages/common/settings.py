"""The settings of params.yaml: their names, types and limits.

params.yaml is the only place that holds values; this file says what may stand there, and params.py reads it.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

BYTE_ALPHABET = 256
SET_NAMES = ("train", "valid", "test", "meta", "bytes")  # files of data/blocks, columns of metrics/corpus.json
MAX_INT = (1 << 62) - 1

# A constraint, and the words that an error message and the docs have for it.
Count = Annotated[int, Field(ge=1, le=MAX_INT), "a whole number of 1 or more"]
CountOrZero = Annotated[int, Field(ge=0, le=MAX_INT), "a whole number of 0 or more"]
SequenceLength = Annotated[int, Field(ge=2, le=MAX_INT), "a whole number of 2 or more"]
Seed = Annotated[int, Field(ge=0, lt=1 << 32), "a whole number from 0 to 4294967295"]
Positive = Annotated[float, Field(gt=0), "a number above 0"]
PositiveOrZero = Annotated[float, Field(ge=0), "a number of 0 or more"]
Fraction = Annotated[float, Field(ge=0, le=1), "a number from 0 to 1"]
Rate = Annotated[float, Field(ge=0, lt=1), "a number from 0 to below 1"]
Probability = Annotated[float, Field(gt=0, le=1), "a number above 0, up to 1"]
ClassPath = Annotated[dict[str, Any], "a class_path and its init_args"]
Options = Annotated[dict[str, Any], "a list of `name: value`"]
Duration = Annotated[dict[str, int], "its days, hours, minutes and seconds"]
ClassPaths = ClassPath | list[ClassPath] | None
Share = int | float | None
Mixed = Literal[
    "auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true", "bf16", "64", "32", "16"
]
Precision = Mixed | Literal["transformer-engine", "transformer-engine-float16", 64, 32, 16]
Betas = Annotated[list[Rate], Field(min_length=2, max_length=2), "a list of 2, each a number from 0 to below 1"]
FilePath = Annotated[str, Field(pattern=r"\S"), "the path of a file or folder (try quotes)"]
SetName = Annotated[str, Field(pattern=rf"\A(?!({'|'.join(SET_NAMES)})\Z)[\w-]+\Z")]
SETS = f"a list of `name: path`, each name of letters, digits, - or _, and none of {', '.join(SET_NAMES)}"


def about(text: str, **limits: Any) -> Any:
    """A field whose description is its line in --help and in docs/settings.md."""
    return Field(description=text, **limits)


class Group(BaseModel):
    """Settings that stand together: names and types as they are written, nothing converted."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True, regex_engine="python-re")
    POSITIONAL: ClassVar[str | None] = None  # the option that stands on the command line without its name

    def mistakes(self) -> dict[str, Any]:
        """Whether values don't fit each other, by what the user then reads: "KEY: WHY: WHAT TO DO"."""
        return {}

    @model_validator(mode="after")
    def check_mistakes(self) -> Self:
        for text, broken in self.mistakes().items():
            if broken:
                raise PydanticCustomError("mistake", "{text}", {"text": text})
        return self


class Data(Group):
    """Text files and how they split into documents."""

    train_file: FilePath = about(
        "text to train on: a file, folder or Hugging Face data set of .txt, .jsonl, .csv or .parquet, compressed or not"
    )
    valid_file: FilePath = about("text that chooses the best checkpoint; the path of train_file: held out of it")
    test_file: FilePath = about("text that only the evaluation sees; the path of train_file: held out of it")
    test_files: Annotated[dict[SetName, str], SETS] = about("further test texts, each by a name")
    document: Literal["blank_line", "line", "file", "separator"] = about(
        "what one document of .txt is: what stands between blank lines (blank_line), line, file, or separator"
    )
    separator: str = about("what stands between documents where document is separator", min_length=1)
    text_key: str = about("field of .jsonl, .csv and .parquet that holds the text")
    valid_fraction: Rate = about("share of documents to hold out where valid_file is train_file")
    test_fraction: Rate = about("share of documents to hold out where test_file is train_file")
    split_seed: Seed = about("seed of which documents are held out")
    deduplicate: Literal["none", "exact", "near"] = about(
        "leave out equal (exact) or similar (near) documents, of train those like valid's and test's: none, exact, near"
    )

    def mistakes(self) -> dict[str, Any]:
        held_out = self.valid_fraction + self.test_fraction
        return {"data.valid_fraction: with data.test_fraction, it leaves nothing to train on: lower it": held_out >= 1}


class Tokenizer(Group):
    """The tokenizer, trained on train_file or taken as it is."""

    tokenizer_model: str | None = about("Hugging Face id or folder of a tokenizer to use instead of training one")
    algorithm: Literal["bpe", "unigram", "byte"] = about(
        "bpe (byte-level), unigram, or byte (256 bytes and end-of-text, no training)"
    )
    lossy: Literal["refuse", "allow"] = about("refuse or allow a tokenizer that doesn't give the exact text back")
    normalization: Literal["nfkc"] | None = about("what is done to text before it is encoded: null (nothing) or nfkc")
    special_tokens: list[str] = about("control tokens of a trained tokenizer, beside end-of-text")
    vocab_size: Count = about("entries of a trained tokenizer, end-of-text and special_tokens included")
    sample_bytes: Count = about("train on a sample of this many bytes when train_file is larger")
    sample_seed: Seed = about("seed of that sample")

    def mistakes(self) -> dict[str, Any]:
        special, least = self.special_tokens, BYTE_ALPHABET + 1 + len(self.special_tokens)
        merges = self.tokenizer_model is None and self.algorithm != "byte"
        return {
            f"tokenizer.vocab_size: {self.vocab_size} is below the byte alphabet: at least {least} (256 bytes, "
            "end-of-text and special_tokens), or set tokenizer.algorithm: byte": merges and self.vocab_size < least,
            f"tokenizer.special_tokens: {special}: must be two or more characters each, and stand there once": any(
                not token.strip() or len(token) < 2 or special.count(token) > 1 for token in special
            ),
        }


class Model(Group):
    """GPT-2: its shape, or a pretrained one to fine-tune."""

    from_pretrained: str | None = about("Hugging Face id or folder of a GPT-2 to fine-tune; it sets the shape")
    block_size: SequenceLength = about("tokens the model sees at once (context length)")
    n_layer: Count = about("transformer blocks")
    n_head: Count = about("attention heads a block; n_embd must be divisible by it")
    n_embd: Count = about("width of the embeddings")
    dropout: Rate = about("dropout rate of embeddings, attention and residuals")
    compile: bool = about("torch.compile the training step (needs a C++ compiler on a CPU)")
    gradient_checkpointing: bool = about("compute each block again in the backward pass: less memory, more time")

    def mistakes(self) -> dict[str, Any]:
        odd = self.from_pretrained is None and self.n_embd % self.n_head
        why = f"{self.n_embd} is not divisible by model.n_head {self.n_head}"
        return {f"model.n_embd: {why}: change one of them": odd}


class Optimizer(Group):
    """How the weights are updated."""

    name: Literal["adamw", "muon"] = about("adamw, or muon (Muon for the matrices of the blocks, AdamW for the rest)")
    lr: Positive = about("peak learning rate")
    batch_size: Count = about("blocks in one forward and backward pass, over all devices together")
    weight_decay: PositiveOrZero = about("decoupled weight decay of matrices (biases, norms and vectors have none)")
    betas: Betas = about("decay rates of the running gradient and its square: AdamW's, and Muon's momentum and neurons")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = about(
        "what follows the warm-up: cosine, linear, constant, or wsd (constant, then a cooldown that falls as 1 - sqrt)"
    )
    decay_fraction: Probability = about("wsd: the last share of the steps, in which the learning rate falls")
    num_warmup_steps: CountOrZero = about("optimizer steps of linear warm-up from 0 to lr")
    num_training_steps: Count | None = about("optimizer steps of the whole schedule; null: as many as the trainer does")
    min_lr_ratio: Fraction | None = about("where the schedule ends, as a fraction of lr; null: 0.1, and 0 for wsd")

    def mistakes(self) -> dict[str, Any]:
        warmup, total = self.num_warmup_steps, self.num_training_steps
        return {
            f"optimizer.num_warmup_steps: {warmup} leaves no step after the warm-up: lower it below "
            f"optimizer.num_training_steps {total}": total is not None and warmup >= total
        }


class Trainer(Group):
    """Keyword arguments of pytorch_lightning.Trainer; the defaults of those that params.yaml leaves out are its own."""

    max_epochs: int | None = about("passes over the training text at most; -1: no limit", default=None)
    min_epochs: int | None = about("passes over the training text at least", default=None)
    max_steps: int = about("optimizer steps at most; -1: no limit", default=-1)
    min_steps: int | None = about("optimizer steps at least", default=None)
    max_time: str | Duration | None = about("time at most, as DD:HH:MM:SS", default=None)
    precision: Precision | None = about(
        "number format; auto: bf16-mixed where the hardware multiplies bf16, else 32-true", default=None
    )
    accumulate_grad_batches: int = about("batches that an optimizer step learns from", default=1)
    gradient_clip_val: int | float | None = about(
        "gradients are scaled down to this norm; null: none are", default=None
    )
    gradient_clip_algorithm: Literal["norm", "value"] | None = about("clip by norm or by value", default=None)
    deterministic: bool | Literal["warn"] | None = about("only operations that give the same bits", default=None)
    accelerator: str | ClassPath = about("what to compute on: auto, cpu, gpu, mps ...", default="auto")
    devices: list[int] | str | int = about("how many CPUs' processes or GPUs; -1: all", default="auto")
    num_nodes: int = about("how many machines", default=1)
    strategy: str | ClassPath = about("how several devices share the work: auto, ddp, fsdp ...", default="auto")
    val_check_interval: int | float | str | Duration | None = about(
        "how often to validate: fraction of an epoch, or whole number of batches", default=None
    )
    check_val_every_n_epoch: int | None = about("validate in every nth epoch; null: by batches alone", default=1)
    callbacks: ClassPaths = about("callbacks by class_path and init_args, as in LightningCLI", default=None)
    plugins: ClassPaths = about("plugins by class_path and init_args", default=None)
    logger: bool | ClassPaths = about("loggers beside TensorBoard and DVCLive", default=None)
    fast_dev_run: int | bool = about("not here: it would leave no model", default=False)
    limit_train_batches: Share = about("how many batches of an epoch, or which fraction of it", default=None)
    limit_val_batches: Share = about("the same of a validation", default=None)
    limit_test_batches: Share = about("the same of a test: there is none", default=None)
    limit_predict_batches: Share = about("the same of a prediction: there is none", default=None)
    overfit_batches: int | float = about("train on these few batches alone", default=0.0)
    benchmark: bool | None = about("let cuDNN choose its algorithms by timing", default=None)
    inference_mode: bool = about("validate without gradients", default=True)
    detect_anomaly: bool = about("stop at the first NaN in a gradient", default=False)
    sync_batchnorm: bool = about("GPT-2 has no batch norm", default=False)

    def mistakes(self) -> dict[str, Any]:
        clip, batches, every = self.gradient_clip_val, self.accumulate_grad_batches, self.check_val_every_n_epoch
        endless = self.max_epochs in (None, -1) and self.max_steps == -1 and self.max_time is None
        ends = ("max_epochs", "max_steps", "limit_train_batches")
        return {
            "trainer.max_epochs: no end of training: set it, trainer.max_steps or trainer.max_time": endless,
            "trainer.fast_dev_run: would leave no model: set trainer.max_steps to a small number": self.fast_dev_run,
            "trainer.logger: TensorBoard and DVCLive are always there: name another one by class_path, or null": (
                isinstance(self.logger, bool)
            ),
            **{f"trainer.{name}: 0 trains nothing: raise it": getattr(self, name) == 0 for name in ends},
            "trainer.precision: 16-true: its rounding loses most of a step: set bf16-true or 16-mixed": (
                self.precision == "16-true"
            ),
            "trainer.val_check_interval: 0: set trainer.limit_val_batches to 0 for no validation": (
                self.val_check_interval == 0
            ),
            f"trainer.check_val_every_n_epoch: {every}: must be 1 or more, or null": every is not None and every < 1,
            f"trainer.gradient_clip_val: {clip}: must be 0 or more, or null": (clip or 0) < 0,
            f"trainer.accumulate_grad_batches: {batches}: must be 1 or more": batches < 1,
        }


class Evaluate(Group):
    """How perplexity is measured."""

    stride: Count | None = about("tokens between the starts of two windows; null: block_size (no overlap)")
    batch_size: Count = about("windows in one forward pass")
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = about("what to compute on; auto: a GPU where there is one")
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] | None = about(
        "number format of the computation; null: the mixed one of the training, or 32-true"
    )


class Generate(Group):
    """Samples of the trained model."""

    prompts: list[str] = about("texts to continue in metrics/samples.md")
    max_new_tokens: Count = about("tokens to add to a prompt")
    temperature: PositiveOrZero = about("below 1 sharper, above 1 flatter; 0 always takes the likeliest token")
    top_k: CountOrZero = about("choose among the k likeliest tokens; 0: all")
    top_p: Probability = about("choose among the likeliest tokens that hold this probability; 1: all")
    seed: Seed = about("seed of the choices")


class Runtime(Group):
    """Settings that can't change a byte of any output, so no stage reruns for them."""

    num_workers: CountOrZero = about("processes that load training batches; 0: the training process itself")
    log_every_n_steps: Count = about("optimizer steps between two points in the logs")
    enable_progress_bar: bool = about("show the progress line")
    checkpoint_every_n_steps: CountOrZero = about("optimizer steps between two resume checkpoints; 0: none by steps")
    checkpoint_every_n_minutes: PositiveOrZero = about("minutes between two resume checkpoints; 0: none by time")
    keep_trunks: CountOrZero = about("wsd: how many checkpoints from the start of a cooldown to keep, the newest ones")
    profiler: Literal["simple", "advanced"] | None = about("Lightning's profiler: simple, advanced or null")
    num_sanity_val_steps: CountOrZero = about("validation batches to try before training")
    tasks: Count = about("parts in which prepare_corpus and tokenize_blocks do their work; 1: in one process, at once")
    executor: Literal["local", "ray", "slurm"] = about(
        "who runs these tasks: local (processes of this machine), ray or slurm (a cluster)"
    )
    executor_options: Options = about("arguments of the executor")


class Settings(Group):
    """All of params.yaml."""

    data: Data
    tokenizer: Tokenizer
    model: Model
    optimizer: Optimizer
    trainer: Trainer = Field(default={}, validate_default=True)
    seed_everything: Seed = about("seed of initial weights, data order, dropout")
    evaluate: Evaluate
    generate: Generate
    runtime: Runtime
    options: Any = None

    def mistakes(self) -> dict[str, Any]:
        stride, block_size = self.evaluate.stride, self.model.block_size
        return {
            f"evaluate.stride: {stride} is above model.block_size {block_size}: lower it": (stride or 0) > block_size
        }

    def plain(self) -> dict[str, Any]:
        """Every setting as YAML and JSON can hold it."""
        return self.model_dump(exclude={"options"})


def as_list(value: Any) -> list:
    """What may stand alone, in a list, or not at all."""
    return value if isinstance(value, list) else [] if value is None else [value]
