"""The settings of params.yaml: their names, types and limits, checked before any stage works.

params.yaml is the only place that holds values; this file says what may stand there. Every
stage checks the whole file, so that a slip in a late stage's group stops the first one.
"""

import argparse
import difflib
import os
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)

PARAMS_FILE = "params.yaml"
MAX_PARAMS_BYTES = 1 << 20
BYTE_ALPHABET = 256
DropoutRate = restricted_number_type("DropoutRate", float, [(">=", 0), ("<", 1)])
Probability = restricted_number_type("Probability", float, [(">", 0), ("<=", 1)])
SequenceLength = restricted_number_type("SequenceLength", int, (">=", 2))


class UserError(Exception):
    """A mistake in the user's input; its text is the one line that the user reads."""


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
        algorithm: bpe (byte-level), unigram, or byte (256 bytes and end-of-text, no training).
        vocab_size: entries of a trained tokenizer, end-of-text included.
        sample_bytes: train on a sample of this many bytes when train_file is larger.
        sample_seed: seed of that sample.
    """

    tokenizer_model: str | None
    algorithm: Literal["bpe", "unigram", "byte"]
    vocab_size: PositiveInt
    sample_bytes: PositiveInt
    sample_seed: NonNegativeInt


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
    """

    from_pretrained: str | None
    block_size: SequenceLength
    n_layer: PositiveInt
    n_head: PositiveInt
    n_embd: PositiveInt
    dropout: DropoutRate


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
    lr: PositiveFloat
    batch_size: PositiveInt
    weight_decay: NonNegativeFloat
    betas: tuple[ClosedUnitInterval, ClosedUnitInterval]
    schedule: Literal["cosine", "linear", "constant"]
    num_warmup_steps: NonNegativeInt
    num_training_steps: PositiveInt | None
    min_lr_ratio: ClosedUnitInterval


@dataclass
class Evaluate:
    """How perplexity is measured.

    Args:
        stride: tokens between the starts of two windows; null: block_size (no overlap).
        batch_size: windows in one forward pass.
    """

    stride: PositiveInt | None
    batch_size: PositiveInt


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
    max_new_tokens: PositiveInt
    temperature: NonNegativeFloat
    top_k: NonNegativeInt
    top_p: Probability
    seed: NonNegativeInt


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

    num_workers: NonNegativeInt
    log_every_n_steps: PositiveInt
    enable_progress_bar: bool
    checkpoint_every_n_steps: NonNegativeInt
    checkpoint_every_n_minutes: NonNegativeFloat
    profiler: Literal["simple", "advanced"] | None
    num_sanity_val_steps: NonNegativeInt


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


def make_parser(stage: str, description: str) -> ArgumentParser:
    """The command line of a stage: every setting, with params.yaml as its defaults."""
    from pytorch_lightning import Trainer

    parser = ArgumentParser(
        prog=f"python -m stages.{stage}",
        description=description,
        exit_on_error=False,
        default_config_files=[PARAMS_FILE],
        allow_abbrev=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file whose settings override params.yaml.")
    parser.add_argument(
        "--seed_everything", type=NonNegativeInt, required=True, help="Seed of initial weights, data order, dropout."
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
    files = [PARAMS_FILE]
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            files.append(argv[i + 1])
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
    lines = {path: _read_yaml_lines(path) for path in files}
    try:
        settings = parser.parse_args(argv)
    except ArgumentError as error:
        raise UserError(_explain(str(error), parser, lines)) from None
    for key, value in settings.items():
        settings[key] = _plain(value)
    _check_combinations(settings, lines)
    _check_watched(settings, lines)
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
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(name)
    known, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    return vars(known)[name.lstrip("-")], rest


def run(main) -> None:
    """Runs a stage's main(): a mistake of the user's ends it with one line and exit status 1."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        # A full disk or a file without permission is no bug of ours, so no traceback.
        sys.exit(f"error: {error.filename or 'writing output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os._exit(1)


def _read_yaml_lines(path: str) -> dict[str, int]:
    """Line number of every dotted key, once the file is known to be plain, small YAML."""
    try:
        raw = Path(path).read_bytes() if os.path.getsize(path) <= MAX_PARAMS_BYTES else None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if raw is None:
        raise UserError(f"{path}: larger than {MAX_PARAMS_BYTES:,} bytes: settings are short, keep text in files")
    try:
        for event in yaml.parse(raw, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f"{path}:{event.start_mark.line + 1}: aliases (*) aren't allowed: write the value out")
        root = yaml.compose(raw, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(f"{path}:{mark.line + 1}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None

    lines = {}

    def walk(node, prefix: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            line = key.start_mark.line + 1
            if name in lines:
                raise UserError(f"{path}:{line}: {name}: set twice, first on line {lines[name]}: remove one")
            lines[name] = line
            walk(value, f"{name}.")

    walk(root, "")
    return lines


def _place(key: str, lines: dict[str, dict[str, int]]) -> str:
    for path, keys in reversed(lines.items()):
        if key in keys:
            return f"{path}:{keys[key]}: {key}"
    return key


def _explain(message: str, parser: ArgumentParser, lines: dict[str, dict[str, int]]) -> str:
    """One line for the user from jsonargparse's message of several."""
    if unknown := re.search(r"Group '(.+?)' does not accept option '(.+?)'", message):
        return _unknown(f"{unknown[1]}.{unknown[2]}", parser, lines)
    if unknown := re.search(
        r"(?:Key|option|arguments?:?|Unrecognized arguments:) '?-*([\w.]+)'?.*not (?:expected|accepted)", message
    ):
        return _unknown(unknown[1], parser, lines)
    if unknown := re.search(r"[Uu]nrecognized arguments: -*([\w.]+)", message):
        return _unknown(unknown[1], parser, lines)
    if missing := re.search(r"arguments are required: (.+)", message):
        return f"{PARAMS_FILE}: missing {missing[1]}: add it (the committed {PARAMS_FILE} shows every setting)"
    key = re.search(r'Parser key "(.+?)"', message)
    detail = message[key.end() :] if key else message
    value = re.search(r"Given value: (.*)", detail, re.S)
    if value:
        causes = [
            c.strip(" -\n") for c in re.findall(r"^ +-? ?(?!Subtypes|Errors|Given)(.+)$", detail[: value.start()], re.M)
        ]
        causes = [c for c in causes if not c.startswith(("Does not validate", "Subtypes", "Errors", "Given", "a "))]
        causes = [re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", c).replace("NoneType", "null") for c in causes]
        expected = [c.removeprefix("Expected a ") for c in causes if c.startswith("Expected a ")]
        others = [c.rstrip(":") for c in causes if not c.startswith("Expected a ")]
        detail = f"got {value[1].strip()!r}; " + "; ".join(
            ([f"expected {' or '.join(expected)}"] if expected else []) + others
        )
    detail = " ".join(re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", detail.strip(" :\n")).split())
    return f"{_place(key[1], lines)}: {detail}" if key else detail


def _unknown(key: str, parser: ArgumentParser, lines: dict[str, dict[str, int]]) -> str:
    name = key.removeprefix("trainer.")
    if key.startswith("trainer.") and name in {field.name for field in fields(Runtime)}:
        return f"{_place(key, lines)}: stands in the runtime group here: move it to runtime.{name}"
    known = [action.dest for action in parser._actions]
    close = difflib.get_close_matches(key, known, n=1) or [k for k in known if k.split(".")[-1] == name]
    hint = f"did you mean {close[0]}?" if close else f"see python -m {parser.prog.split()[-1]} --help"
    return f"{_place(key, lines)}: no such setting: {hint}"


def _check_combinations(settings: Namespace, lines: dict[str, dict[str, int]]) -> None:
    model, tokenizer, optimizer, trainer = settings.model, settings.tokenizer, settings.optimizer, settings.trainer

    def fail(key: str, text: str) -> None:
        raise UserError(f"{_place(key, lines)}: {text}")

    for key, value in (
        ("data.train_file", settings.data.train_file),
        ("data.valid_file", settings.data.valid_file),
        ("data.test_file", settings.data.test_file),
    ):
        if not value:
            fail(key, "empty: name a UTF-8 text file")
    if tokenizer.tokenizer_model is None and tokenizer.algorithm != "byte" and tokenizer.vocab_size <= BYTE_ALPHABET:
        fail(
            "tokenizer.vocab_size",
            f"{tokenizer.vocab_size} is below the byte alphabet: at least {BYTE_ALPHABET + 1} "
            "(256 bytes and end-of-text), or set tokenizer.algorithm: byte",
        )
    if model.from_pretrained is None and model.n_embd % model.n_head:
        fail("model.n_embd", f"{model.n_embd} is not divisible by model.n_head {model.n_head}")
    if settings.evaluate.stride is not None and settings.evaluate.stride > model.block_size:
        fail("evaluate.stride", f"{settings.evaluate.stride} is above model.block_size {model.block_size}")
    if optimizer.num_training_steps is not None and optimizer.num_warmup_steps >= optimizer.num_training_steps:
        fail(
            "optimizer.num_warmup_steps",
            f"{optimizer.num_warmup_steps} leaves no step after the warm-up: "
            f"optimizer.num_training_steps is {optimizer.num_training_steps}",
        )
    if trainer.max_epochs is None and trainer.max_steps == -1 and trainer.max_time is None:
        fail("trainer.max_epochs", "no end of training: set trainer.max_epochs, trainer.max_steps or trainer.max_time")
    if -1 in (trainer.max_epochs,) and trainer.max_steps == -1 and trainer.max_time is None:
        fail("trainer.max_epochs", "no end of training: set trainer.max_epochs, trainer.max_steps or trainer.max_time")
    if trainer.accumulate_grad_batches < 1:
        fail("trainer.accumulate_grad_batches", f"{trainer.accumulate_grad_batches}: must be 1 or more")


def _check_watched(settings: Namespace, lines: dict[str, dict[str, int]]) -> None:
    """Run by DVC, a stage may read only what DVC watches, or a change in it would rerun nothing."""
    stage = os.environ.get("DVC_STAGE")
    key = FOLDER_SETTINGS.get(stage)
    folder = settings.get(key) if key else None
    if folder and os.path.isdir(folder):
        deps = yaml.safe_load(Path("dvc.yaml").read_text())["stages"][stage]["deps"]
        if os.path.normpath(folder) not in map(os.path.normpath, deps):
            raise UserError(
                f"{_place(key, lines)}: DVC doesn't watch the folder {folder}: "
                f"add `- {folder}` to the deps of {stage} in dvc.yaml"
            )
