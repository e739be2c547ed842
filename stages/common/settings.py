"""The settings of params.yaml: their names, types and limits, checked before any stage works.

params.yaml is the only place that holds values; this file says what may stand there. Every
stage checks the whole file, so that a slip in a late stage's group stops the first one.
"""

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

from stages.common.errors import UserError

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import ClosedUnitInterval, restricted_number_type

PARAMS_FILE = "params.yaml"
MAX_PARAMS_BYTES = 1 << 20
MAX_PARAMS_DEPTH = 20
BYTE_ALPHABET = 256

MAX_INT = (1 << 62) - 1
Count = restricted_number_type("Count", int, [(">=", 1), ("<=", MAX_INT)])
CountOrZero = restricted_number_type("CountOrZero", int, [(">=", 0), ("<=", MAX_INT)])
SequenceLength = restricted_number_type("SequenceLength", int, [(">=", 2), ("<=", MAX_INT)])
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 1 << 32)])
Positive = restricted_number_type("Positive", float, [(">", 0), ("<", math.inf)])
PositiveOrZero = restricted_number_type("PositiveOrZero", float, [(">=", 0), ("<", math.inf)])
Rate = restricted_number_type("Rate", float, [(">=", 0), ("<", 1)])
Probability = restricted_number_type("Probability", float, [(">", 0), ("<=", 1)])

# How an error message calls them.
TYPE_WORDS = {
    Count: "a whole number of 1 or more",
    CountOrZero: "a whole number of 0 or more",
    SequenceLength: "a whole number of 2 or more",
    Seed: "a whole number from 0 to 4294967295",
    Positive: "a number above 0",
    PositiveOrZero: "a number of 0 or more",
    ClosedUnitInterval: "a number from 0 to 1",
    Rate: "a number from 0 to below 1",
    Probability: "a number above 0, up to 1",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text (try quotes)",
    type(None): "null",
}


@dataclass
class Data:
    """Text files and how they split into documents.

    Args:
        train_file: UTF-8 text to train on.
        valid_file: UTF-8 text that chooses the best checkpoint.
        test_file: UTF-8 text that only the evaluation sees.
        document: what one document is: blank_line (separated by blank lines), line or file.
    """

    train_file: str
    valid_file: str
    test_file: str
    document: Literal["blank_line", "line", "file"]


@dataclass
class Tokenizer:
    """The tokenizer, trained on train_file or taken as it is.

    Args:
        tokenizer_model: Hugging Face id or folder of a tokenizer to use instead of training one.
        lossy: refuse or allow a tokenizer that doesn't give the exact text back.
        algorithm: bpe (byte-level), unigram, or byte (256 bytes and end-of-text, no training).
        normalization: what is done to text before it is encoded: null (nothing) or nfkc.
        special_tokens: control tokens of a trained tokenizer, beside end-of-text.
        vocab_size: entries of a trained tokenizer, end-of-text and special_tokens included.
        sample_bytes: train on a sample of this many bytes when train_file is larger.
        sample_seed: seed of that sample.
    """

    tokenizer_model: str | None
    lossy: Literal["refuse", "allow"]
    algorithm: Literal["bpe", "unigram", "byte"]
    normalization: Literal["nfkc"] | None
    special_tokens: list[str]
    vocab_size: Count
    sample_bytes: Count
    sample_seed: Seed


@dataclass
class Model:
    """GPT-2: its shape, or a pretrained one to fine-tune.

    Args:
        from_pretrained: Hugging Face id or folder of a GPT-2 to fine-tune; it sets the shape.
        block_size: tokens the model sees at once (context length).
        n_layer: transformer blocks.
        n_head: attention heads a block; n_embd must be divisible by it.
        n_embd: width of the embeddings.
        dropout: dropout rate of embeddings, attention and residuals.
        compile: torch.compile the training step (needs a C++ compiler on a CPU).
    """

    from_pretrained: str | None
    block_size: SequenceLength
    n_layer: Count
    n_head: Count
    n_embd: Count
    dropout: Rate
    compile: bool


@dataclass
class Optimizer:
    """How the weights are updated.

    Args:
        name: adamw, or muon (Muon for the matrices of the blocks, AdamW for the rest).
        lr: peak learning rate.
        batch_size: blocks in one forward and backward pass, over all devices together.
        weight_decay: decoupled weight decay of matrices (biases, norms and vectors have none).
        betas: AdamW's decay rates of the running gradient and its square.
        schedule: what follows the warm-up: cosine, linear or constant.
        num_warmup_steps: optimizer steps of linear warm-up from 0 to lr.
        num_training_steps: optimizer steps of the whole schedule; null: as many as the trainer does.
        min_lr_ratio: where cosine and linear end, as a fraction of lr.
    """

    name: Literal["adamw", "muon"]
    lr: Positive
    batch_size: Count
    weight_decay: PositiveOrZero
    betas: tuple[Rate, Rate]
    schedule: Literal["cosine", "linear", "constant"]
    num_warmup_steps: CountOrZero
    num_training_steps: Count | None
    min_lr_ratio: ClosedUnitInterval


@dataclass
class Evaluate:
    """How perplexity is measured.

    Args:
        stride: tokens between the starts of two windows; null: block_size (no overlap).
        batch_size: windows in one forward pass.
    """

    stride: Count | None
    batch_size: Count


@dataclass
class Generate:
    """Samples of the trained model.

    Args:
        prompts: texts to continue in metrics/samples.md.
        max_new_tokens: tokens to add to a prompt.
        temperature: below 1 sharper, above 1 flatter; 0 always takes the likeliest token.
        top_k: choose among the k likeliest tokens; 0: all.
        top_p: choose among the likeliest tokens that hold this probability; 1: all.
        seed: seed of the choices.
    """

    prompts: list[str]
    max_new_tokens: Count
    temperature: PositiveOrZero
    top_k: CountOrZero
    top_p: Probability
    seed: Seed


@dataclass
class Runtime:
    """Settings that can't change a byte of any output, so no stage reruns for them.

    Args:
        num_workers: processes that load training batches; 0: the training process itself.
        log_every_n_steps: optimizer steps between two points in the logs.
        enable_progress_bar: show the progress line.
        checkpoint_every_n_steps: optimizer steps between two resume checkpoints; 0: none by steps.
        checkpoint_every_n_minutes: minutes between two resume checkpoints; 0: none by time.
        profiler: Lightning's profiler: simple, advanced or null.
        num_sanity_val_steps: validation batches to try before training.
    """

    num_workers: CountOrZero
    log_every_n_steps: Count
    enable_progress_bar: bool
    checkpoint_every_n_steps: CountOrZero
    checkpoint_every_n_minutes: PositiveOrZero
    profiler: Literal["simple", "advanced"] | None
    num_sanity_val_steps: CountOrZero


GROUPS = {
    "data": Data,
    "tokenizer": Tokenizer,
    "model": Model,
    "optimizer": Optimizer,
    "evaluate": Evaluate,
    "generate": Generate,
    "runtime": Runtime,
}

# The stage that reads the folder which a setting may name.
FOLDER_SETTINGS = {"train_tokenizer": "tokenizer.tokenizer_model", "train": "model.from_pretrained"}

# Trainer arguments that stand in the runtime group, or that the train stage itself sees to.
NOT_TRAINER_SETTINGS = {
    *(field.name for field in fields(Runtime)),
    "logger",
    "enable_checkpointing",
    "enable_model_summary",
    "default_root_dir",
    "use_distributed_sampler",
    "reload_dataloaders_every_n_epochs",
    "barebones",
    "model_registry",
    "enable_autolog_hparams",
}


def make_parser(module: str, description: str) -> ArgumentParser:
    """The command line of a stage: every setting, with params.yaml as its defaults."""
    from pytorch_lightning import Trainer

    parser = ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        exit_on_error=False,
        default_config_files=[PARAMS_FILE],
        allow_abbrev=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file whose settings override params.yaml.")
    parser.add_argument(
        "--seed_everything", type=Seed, required=True, help="Seed of initial weights, data order, dropout."
    )
    for name, group in GROUPS.items():
        parser.add_class_arguments(group, name)
    parser.add_class_arguments(Trainer, "trainer", instantiate=False, skip=NOT_TRAINER_SETTINGS)
    return parser


def load(parser: ArgumentParser, argv: list[str] | None = None) -> Namespace:
    """Settings from params.yaml, --config files and the command line, checked.

    Raises:
        UserError: a file that can't be read, an unknown or missing setting, a wrong type or value,
            an impossible combination.
    """
    argv = sys.argv[1:] if argv is None else argv
    given = {}
    for path in [PARAMS_FILE, *_values_of("--config", argv)]:
        given |= _read_settings(path, parser)
    for option in (argument.split("=")[0] for argument in argv if argument.startswith("--")):
        if values := _values_of(option, argv):
            given[option.lstrip("-")] = (option, values[-1])
    try:
        settings = parser.parse_args(argv)
    except ArgumentError as error:
        raise UserError(_explain(str(error), parser, given)) from None
    for key, value in settings.items():
        settings[key] = _plain(value)
    _check_combinations(settings, given)
    _check_watched(settings, given)
    return settings


def _plain(value):
    """Python's own numbers for jsonargparse's: torch.load(weights_only=True) refuses a checkpoint with the latter."""
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return int(value) if isinstance(value, int) else float(value)
    return value


def take_option(name: str, argv: list[str] | None = None) -> tuple[str | None, list[str]]:
    """An option's value, and the command line without it: for names that are also a group's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(name)
    try:
        known, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{name}: {error.message}: give it a value") from None
    return vars(known)[name.lstrip("-")], rest


def _values_of(option: str, argv: list[str]) -> list[str]:
    following = [after for argument, after in zip(argv, argv[1:]) if argument == option]
    return following + [a.removeprefix(f"{option}=") for a in argv if a.startswith(f"{option}=")]


def _read_settings(path: str, parser: ArgumentParser) -> dict[str, tuple[str, str]]:
    """Where each dotted key of a file stands ("params.yaml:12") and its text, once the file is known
    to be plain, small YAML with known names."""
    try:
        raw = Path(path).read_bytes() if os.path.getsize(path) <= MAX_PARAMS_BYTES else None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: `git checkout {PARAMS_FILE}` brings the last one back") from None
    if raw is None:
        raise UserError(f"{path}: larger than {MAX_PARAMS_BYTES:,} bytes: settings are short, keep text in files")
    try:
        text = raw.decode("utf-8-sig")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            place = f"{path}:{event.start_mark.line + 1}"
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_PARAMS_DEPTH:
                raise UserError(f"{place}: more than {MAX_PARAMS_DEPTH} lists and groups in each other: remove some")
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f"{place}: aliases (*) aren't allowed: write the value out")
            if getattr(event, "tag", None) is not None:
                raise UserError(f"{place}: tags (!) aren't allowed: write the plain value")
            if isinstance(event, yaml.ScalarEvent) and re.search("[\ud800-\udfff]", event.value):
                raise UserError(f"{place}: half a character (a surrogate): remove it")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte offset {error.start:,}: save it as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        hint = "indent with spaces" if "'\\t'" in error.problem else "compare with `git diff`"
        raise UserError(f"{path}:{mark.line + 1}: not valid YAML: {error.problem}: {hint}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}: compare with `git diff`") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: not a list of `name: value` settings: `git checkout {PARAMS_FILE}` brings it back")

    given = {}

    def walk(node: yaml.Node, prefix: str) -> None:
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                walk(item, f"{prefix}{i}.")
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                name = f"{prefix}{key.value}"
                place = f"{path}:{key.start_mark.line + 1}"
                if name in given:
                    raise UserError(f"{place}: {name}: set twice, first at {given[name][0]}: remove one")
                given[name] = (place, text[value.start_mark.index : value.end_mark.index])
                if name in groups and not isinstance(value, yaml.MappingNode):
                    raise UserError(f"{place}: {name}: got {_short(given[name][1])}, must hold settings, one a line")
                walk(value, f"{name}.")

    groups = {*GROUPS, "trainer"}
    walk(root, "")
    known = groups.union(action.dest for action in parser._actions)
    for name, (place, _) in given.items():
        if name not in known and name.rpartition(".")[0] in {"", *groups}:
            raise UserError(_unknown(name, place, parser))
    return given


def _place(key: str, given: dict[str, tuple[str, str]]) -> str:
    place = given.get(key, (PARAMS_FILE, ""))[0]
    return place if place == f"--{key}" else f"{place}: {key}"


def _explain(message: str, parser: ArgumentParser, given: dict[str, tuple[str, str]]) -> str:
    """One line for the user from jsonargparse's message of several."""
    if unknown := re.match(r"unrecognized arguments: (\S+)", message):
        name = unknown[1].split("=")[0]
        if name.startswith("--"):
            return _unknown(name.lstrip("-"), name, parser)
        return f"{name}: not a setting: write --NAME VALUE, see {parser.prog} --help"
    if missing := re.match(r"the following arguments are required: (.+)", message):
        names = missing[1].split(", ")
        if nulls := [name for name in names if name in given]:
            return _wrong_value(nulls[0], given)
        if names[0] in _types():
            return f"{PARAMS_FILE}: {missing[1]}: missing: `git diff {PARAMS_FILE}` shows what was removed"
        return f"--{names[0]}: missing: give it a value"
    if single := re.match(r"argument (--\S+): expected one argument", message):
        return f"{single[1]}: needs one value (a value that begins with -: {single[1]}=VALUE)"
    if key := re.match(r'Parser key "([\w.]+)":?', message):
        if key[1] in _types():
            return _wrong_value(key[1], given, message)
        message = f"{_place(key[1], given)}: {message[key.end() :]}"
    # What jsonargparse says in another form than these is still told, if less clearly.
    return f"{' '.join(message.split())}: see {parser.prog} --help"


def _wrong_value(key: str, given: dict[str, tuple[str, str]], message: str = "") -> str:
    text = f"{_place(key, given)}: got {_short(given.get(key, ('', ''))[1])}"
    # Of a class and its arguments, only jsonargparse knows what is wrong.
    reason = first_reason(message)
    if reason.startswith(("Problem with given class", "Import path", "Expected a dot import path")):
        return f"{text}: {reason}: write class_path and init_args as for LightningCLI"
    return f"{text}, must be {_words(_types()[key])}"


def first_reason(message: str) -> str:
    """What jsonargparse says about the first type of several that a value might have."""
    reason = re.search(r"^ +- (.+?)(?=^ +- |^ *Given |\Z)", message, re.S | re.M)
    return " ".join((reason[1] if reason else message).split())


def _unknown(key: str, place: str, parser: ArgumentParser) -> str:
    leaf = key.split(".")[-1]
    place = place if place == f"--{key}" else f"{place}: {key}"
    if key == f"trainer.{leaf}" and leaf in get_type_hints(Runtime):
        return f"{place}: stands in the runtime group here: move it to runtime.{leaf}"
    if key == f"trainer.{leaf}" and leaf in NOT_TRAINER_SETTINGS:
        return f"{place}: the train stage itself sees to it: remove it"
    known = [action.dest for action in parser._actions]
    close = [name for name in known if name.split(".")[-1] == leaf] or difflib.get_close_matches(key, known, n=1)
    return f"{place}: no such setting: " + (f"did you mean {close[0]}?" if close else f"see {parser.prog} --help")


def _types() -> dict[str, type]:
    """The type of each setting in params.yaml."""
    from pytorch_lightning import Trainer

    groups = GROUPS | {"trainer": Trainer.__init__}
    types = {f"{group}.{name}": kind for group, of in groups.items() for name, kind in get_type_hints(of).items()}
    return types | {"seed_everything": Seed}


def _words(kind) -> str:
    """A type as an error message calls it."""
    arguments = get_args(kind)
    if kind in TYPE_WORDS:
        return TYPE_WORDS[kind]
    if get_origin(kind) is Literal:
        return f"one of {', '.join(str(argument) for argument in arguments)}"
    if get_origin(kind) is tuple:
        return f"a list of {len(arguments)}, each {_words(arguments[0])}"
    if get_origin(kind) in (list, Iterable):
        return f"a list of {_words(arguments[0])}"
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(dict.fromkeys(_words(argument) for argument in arguments))
    return f"a {getattr(kind, '__name__', kind)}'s class_path and init_args"


def _short(text: str) -> str:
    """A value as the file has it, on one line of bounded length."""
    text = " ".join(text.split()) or "null"
    return text if len(text) <= 60 else f"{text[:60]}..."


def _check_combinations(settings: Namespace, given: dict[str, tuple[str, str]]) -> None:
    model, tokenizer, optimizer, trainer = settings.model, settings.tokenizer, settings.optimizer, settings.trainer

    def fail(key: str, text: str) -> None:
        raise UserError(f"{_place(key, given)}: {text}")

    for key in ("train_file", "valid_file", "test_file"):
        if not settings.data[key].strip():
            fail(f"data.{key}", "empty: name a UTF-8 text file")
    least = BYTE_ALPHABET + 1 + len(tokenizer.special_tokens)
    if tokenizer.tokenizer_model is None and tokenizer.algorithm != "byte" and tokenizer.vocab_size < least:
        fail(
            "tokenizer.vocab_size",
            f"{tokenizer.vocab_size} is below the byte alphabet: at least {least} "
            "(256 bytes, end-of-text and special_tokens), or set tokenizer.algorithm: byte",
        )
    for token in tokenizer.special_tokens:
        if not token.strip() or len(token) < 2 or tokenizer.special_tokens.count(token) > 1:
            fail("tokenizer.special_tokens", f"{token!r}: must be two or more characters, and stand there once")
    if model.from_pretrained is None and model.n_embd % model.n_head:
        fail("model.n_embd", f"{model.n_embd} is not divisible by model.n_head {model.n_head}: change one of them")
    if settings.evaluate.stride is not None and settings.evaluate.stride > model.block_size:
        fail("evaluate.stride", f"{settings.evaluate.stride} is above model.block_size {model.block_size}: lower it")
    if optimizer.num_training_steps is not None and optimizer.num_warmup_steps >= optimizer.num_training_steps:
        fail(
            "optimizer.num_warmup_steps",
            f"{optimizer.num_warmup_steps} leaves no step after the warm-up: "
            f"lower it below optimizer.num_training_steps {optimizer.num_training_steps}",
        )
    if trainer.max_epochs in (None, -1) and trainer.max_steps == -1 and trainer.max_time is None:
        fail("trainer.max_epochs", "no end of training: set trainer.max_epochs, trainer.max_steps or trainer.max_time")
    for key in ("max_epochs", "max_steps", "limit_train_batches"):
        if trainer[key] == 0:
            fail(f"trainer.{key}", "0 trains nothing: raise it")
    if (trainer.gradient_clip_val or 0) < 0:
        fail("trainer.gradient_clip_val", f"{trainer.gradient_clip_val}: must be 0 or more, or null")
    if trainer.accumulate_grad_batches < 1:
        fail("trainer.accumulate_grad_batches", f"{trainer.accumulate_grad_batches}: must be 1 or more")


def _check_watched(settings: Namespace, given: dict[str, tuple[str, str]]) -> None:
    """Run by DVC, a stage may read only what DVC watches, or a change in it would rerun nothing."""
    stage = os.environ.get("DVC_STAGE")
    key = FOLDER_SETTINGS.get(stage)
    folder = settings.get(key) if key else None
    if folder and os.path.isdir(folder):
        deps = yaml.safe_load(Path("dvc.yaml").read_text())["stages"][stage]["deps"]
        if os.path.normpath(folder) not in map(os.path.normpath, deps):
            raise UserError(
                f"{_place(key, given)}: DVC doesn't watch the folder {folder}: "
                f"add `- {folder}` to the deps of {stage} in dvc.yaml"
            )
