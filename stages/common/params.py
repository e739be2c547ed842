"""Settings from params.yaml, --config files and the command line, checked before any stage works.

Every stage checks the whole file, so that a slip in a late stage's group stops the first one. A mistake is one line:
where, what, and what may stand there.
"""

import difflib
import re
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from stages.common import plain_yaml
from stages.common.commands import CommandLine
from stages.common.errors import UserError
from stages.common.plain_yaml import Places
from stages.common.settings import Group, Runtime, Settings, Trainer

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from pydantic import ValidationError

PARAMS_FILE = "params.yaml"
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text (try quotes)",
    type(None): "null",
}


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
