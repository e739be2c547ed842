"""The settings of params.yaml: their names, types and limits, checked before any stage works.

params.yaml is the only place that holds values; this file says what may stand there. Every stage
checks the whole file, so that a slip in a late stage's group stops the first one.
"""

import difflib
import re
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

from stages.common import plain_yaml
from stages.common.commands import CommandLine
from stages.common.errors import UserError
from stages.common.plain_yaml import Places

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

PARAMS_FILE = "params.yaml"
BYTE_ALPHABET = 256
SET_NAMES = ("train", "valid", "test", "meta")  # files of data/blocks have them
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
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text (try quotes)",
    type(None): "null",
}


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
        clip, batches = self.gradient_clip_val, self.accumulate_grad_batches
        endless = self.max_epochs in (None, -1) and self.max_steps == -1 and self.max_time is None
        ends = ("max_epochs", "max_steps", "limit_train_batches")
        return {
            "trainer.max_epochs: no end of training: set it, trainer.max_steps or trainer.max_time": endless,
            "trainer.fast_dev_run: would leave no model: set trainer.max_steps to a small number": self.fast_dev_run,
            "trainer.logger: TensorBoard and DVCLive are always there: name another one by class_path, or null": (
                isinstance(self.logger, bool)
            ),
            **{f"trainer.{name}: 0 trains nothing: raise it": getattr(self, name) == 0 for name in ends},
            f"trainer.gradient_clip_val: {clip}: must be 0 or more, or null": (clip or 0) < 0,
            f"trainer.accumulate_grad_batches: {batches}: must be 1 or more": batches < 1,
        }


class Evaluate(Group):
    """How perplexity is measured."""

    stride: Count | None = about("tokens between the starts of two windows; null: block_size (no overlap)")
    batch_size: Count = about("windows in one forward pass")
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = about("what to compute on; auto: a GPU where there is one")
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] | None = about(
        "number format of the computation; null: the one of the training"
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


def fields_of(group: type[Group], prefix: str = "") -> dict[str, tuple[Any, str]]:
    """The type of each setting of a group, and what it is."""
    hints = get_type_hints(group, include_extras=True)
    return {f"{prefix}{name}": (hints[name], field.description or "") for name, field in group.model_fields.items()}


GROUPS = {
    name: kind for name, (kind, _) in fields_of(Settings).items() if isinstance(kind, type) and issubclass(kind, Group)
}
# Trainer arguments that the train stage itself sees to, beside those in the runtime group.
NOT_TRAINER_SETTINGS = (
    "enable_checkpointing enable_model_summary default_root_dir use_distributed_sampler "
    "reload_dataloaders_every_n_epochs barebones model_registry enable_autolog_hparams"
).split()
# Names that the old scripts and Lightning 1 had, in whatever group they stand.
OLD_NAMES = {
    "gpus": "is trainer.devices now, with trainer.accelerator: gpu",
    "auto_lr_find": "not needed any more, because docs/settings.md has rates to start from and "
    "`dvc exp run -S optimizer.lr=...` tries others: remove it",
    "checkpoint_callback": "not needed any more, because the best weights are always kept: remove it",
    "prefetch_factor": "not needed any more, because blocks are mapped into memory: remove it",
    "shuffle_buffer_size": "not needed any more, because all blocks of an epoch are shuffled: remove it",
}


@cache
def trainer_parser() -> ArgumentParser:
    """Checks and instantiates the trainer group: Lightning's signature, and classes by class_path."""
    from pytorch_lightning import Trainer

    parser = ArgumentParser(exit_on_error=False)
    skip = {*NOT_TRAINER_SETTINGS, *Runtime.model_fields}
    parser.add_class_arguments(Trainer, "trainer", instantiate=False, skip=skip)
    return parser


@cache
def known_settings() -> dict[str, tuple[Any, str]]:
    """The type of each setting of params.yaml, and what it is."""
    known = {"seed_everything": fields_of(Settings)["seed_everything"]}
    for name, group in GROUPS.items():
        known |= fields_of(group, f"{name}.")
    return known


def load(module: str, doc: str, options: type[Group] | None = None, argv: list[str] | None = None) -> Settings:
    """Settings from params.yaml, --config files and the command line, checked.

    Args:
        module: what runs, as in `python -m MODULE`.
        doc: what it does, for --help.
        options: what else its command line takes; `options` of the settings then holds it.
        argv: the command line; None: this process's.
    Raises:
        UserError: a file that can't be read, an unknown or missing setting, a wrong type or value,
            an impossible combination.
        SystemExit: --help or --print_config was asked for, and is printed.
    """
    known = (fields_of(options) if options else {}) | known_settings()
    arguments = parse_command(module, doc, known, options.POSITIONAL if options else None, argv)
    values, given = read_settings(PARAMS_FILE)
    values["options"] = {}
    for key, text in arguments.given:
        more, places = read_settings(text) if key == "config" else read_option(key, text, known[key][0])
        for name, value in more.items():
            values[name] = value if name == "seed_everything" else values.get(name, {}) | value
        given |= places
    try:
        values["options"] = options.model_validate(values["options"]) if options else None
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, given, known)) from None
    check_classes(settings.trainer, given)
    if arguments.print_config:
        print(yaml.safe_dump(settings.plain(), sort_keys=False, allow_unicode=True), end="")
        raise SystemExit
    return settings


def parse_command(module: str, doc: str, known: dict, first: str | None, argv: list[str] | None) -> Any:
    """What the command line sets, in its order: `given` holds (key, text)."""
    command = CommandLine(module, doc, usage=f"python -m {module} [--config FILE] [--NAME VALUE ...]")
    command.add_argument("--print_config", action="store_true", help="print all settings as a YAML file")
    for key, (kind, text) in {"config": (str, "YAML file of settings that override params.yaml's"), **known}.items():
        command.add_argument(
            f"--{key}",
            dest="given",
            action="append",
            nargs="?",
            const=(key, None),
            default=[],
            type=lambda text, key=key: (key, text),
            metavar="VALUE",
            help=f"{text} ({words(kind)})".replace(" (try quotes)", "").replace("%", "%%"),
        )
    arguments, unknown = command.parse_known_args(argv)
    if first and unknown and not unknown[0].startswith("--"):
        arguments.given.append((first, unknown.pop(0)))
    if unknown and unknown[0].startswith("--"):
        name = unknown[0].split("=")[0]
        raise UserError(explain_unknown(name[2:], name))
    if unknown:
        raise UserError(f"{unknown[0]}: not a setting: write --NAME VALUE, see {command.prog} --help")
    for key, text in arguments.given:
        if text is None:
            raise UserError(f"--{key}: needs one value (a value that begins with -: --{key}=VALUE)")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise UserError(f"--{key}: not UTF-8 text: write it in the terminal's encoding, UTF-8")
    return arguments


def read_option(key: str, text: str, kind: Any) -> tuple[dict[str, Any], Places]:
    """As `read_settings`, of a command line's KEY VALUE: text where the setting takes text, else YAML."""
    if getattr(kind, "__origin__", kind) is str or kind == str | None and text != "null":
        value = text
    else:
        _, value = plain_yaml.read_text(text, lambda line: f"--{key}", f"--{key}")
    group, _, leaf = key.rpartition(".")
    values = {leaf: value} if key == "seed_everything" else {group or "options": {leaf: value}}
    return values, {key: (f"--{key}", text or "''")}


def read_settings(path: str) -> tuple[dict[str, Any], Places]:
    """A file's values, and for each dotted key its place and text, once the names are known ones."""
    values, given = plain_yaml.read_file(path)
    for key, (place, text) in given.items():
        if key in GROUPS and not isinstance(values[key], dict):
            raise UserError(f"{place}: {key}: got {short(text)}, must hold settings, one a line")
        if key not in known_settings() and key not in GROUPS and key.rpartition(".")[0] in {"", *GROUPS}:
            raise UserError(explain_unknown(key, place))
    return values, given


def check_classes(trainer: Trainer, given: Places) -> None:
    """Raises UserError for a class_path or init_args that are none: what only Lightning and jsonargparse know."""
    for name, value in trainer.model_dump().items():  # a copy: jsonargparse changes what it is given
        key = f"trainer.{name}"
        if "class_path" in given.get(key, ("", ""))[1]:
            try:
                trainer_parser().parse_object({"trainer": {name: value}})
            except ArgumentError as error:
                must = f"{first_reason(str(error))}: write class_path and init_args as for LightningCLI"
                raise UserError(f"{place_of(key, given)}: got {short(given[key][1])}: {must}") from None


def first_reason(message: str) -> str:
    """What jsonargparse says about the first type of several that a value might have, of those that say why."""
    reasons = re.findall(r"^ +- (.+?)(?=^ +- |^ *Given |\Z)", message, re.S | re.M)
    telling = [reason for reason in reasons if not reason.startswith(("Not a valid subclass of ", "Expected a ", "a "))]
    return " ".join((telling or reasons or [message])[0].split())


def explain(error: ValidationError, given: Places, known: dict) -> str:
    """One line for the user from pydantic's errors."""
    errors = error.errors(include_url=False)
    if missing := [".".join(map(str, each["loc"])) for each in errors if each["type"] == "missing"]:
        if missing[0] in known and "." not in missing[0] and missing[0] != "seed_everything":
            return f"--{missing[0]}: missing: give it a value"
        return f"{PARAMS_FILE}: {', '.join(missing)}: missing: `git diff {PARAMS_FILE}` shows what was removed"
    if errors[0]["type"] == "mistake":
        key, text = errors[0]["msg"].split(": ", 1)
        return f"{place_of(key, given)}: {text}"
    location = [str(part) for part in errors[0]["loc"]]
    key = next(key for key in (".".join(location[:2]), location[0]) if key in known)
    return f"{place_of(key, given)}: got {short(given[key][1])}, must be {words(known[key][0])}"


def explain_unknown(key: str, place: str) -> str:
    """One line on a name that no setting has: an old one's fate, or the nearest known one."""
    leaf = key.split(".")[-1]
    place = place if place == f"--{key}" else f"{place}: {key}"
    if key == f"trainer.{leaf}" and leaf in Runtime.model_fields:
        return f"{place}: stands in the runtime group here: move it to runtime.{leaf}"
    if key == f"trainer.{leaf}" and leaf in NOT_TRAINER_SETTINGS:
        return f"{place}: the train stage itself sees to it: remove it"
    if leaf in OLD_NAMES:
        return f"{place}: {OLD_NAMES[leaf]}"
    known = [*GROUPS, *known_settings()]
    close = [name for name in known if name.split(".")[-1] == leaf] or difflib.get_close_matches(key, known, n=1)
    return f"{place}: no such setting: " + (f"did you mean {close[0]}?" if close else "docs/settings.md lists them")


def words(kind: Any) -> str:
    """A type as help, docs and error messages call it."""
    arguments = get_args(kind)
    if get_origin(kind) is Annotated:
        return next(part for part in kind.__metadata__ if isinstance(part, str))
    if kind in WORDS:
        return WORDS[kind]
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if get_origin(kind) is list:
        return f"a list of {words(arguments[0])}"
    return " or ".join(dict.fromkeys(map(words, arguments)))


def place_of(key: str, given: Places) -> str:
    place = given.get(key, (PARAMS_FILE, ""))[0]
    return place if place == f"--{key}" else f"{place}: {key}"


def short(text: str) -> str:
    """A value as the file has it, on one line of bounded length."""
    text = " ".join(text.split()) or "null"
    return text if len(text) <= 60 else f"{text[:60]}..."
