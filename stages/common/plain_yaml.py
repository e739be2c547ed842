"""YAML files of settings: small and plain, each value with the line where it stands."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.common.errors import UserError, one_line

import yaml

Places = dict[str, tuple[str, str]]  # of each dotted key: where it stands ("params.yaml:12"), and its value's text
MAX_BYTES = 1 << 20
MAX_DEPTH = 20
BACK = "`git checkout params.yaml` brings the last one back"


class Loader(yaml.SafeLoader):
    """YAML 1.1, but 1e-2 is a number as in 1.2, and neither a date nor 12:00:00 is one."""


TAG = "tag:yaml.org,2002:"
Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag.removeprefix(TAG) not in ("timestamp", "int", "float")]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
DIGITS = list("-+.0123456789")
Loader.add_implicit_resolver(f"{TAG}int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), DIGITS)
Loader.add_implicit_resolver(
    f"{TAG}float", re.compile(r"[-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.nan)$"), DIGITS
)


def read_file(path: str) -> tuple[dict, Places]:
    """The values of a file, and where they stand.

    Raises:
        UserError: it can't be read, is large, deep, not plain YAML, or sets a key twice.
    """
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise UserError(f"{path}: larger than {MAX_BYTES:,} bytes: settings are short, keep text in files")
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: {BACK}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte offset {error.start:,}: save it as UTF-8") from None
    root, values = read_text(text, lambda line: f"{path}:{line}", path)
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: not a list of `name: value` settings: {BACK}")
    given = {}

    def walk(node: yaml.Node, prefix: str) -> None:
        for i, part in enumerate(node.value if isinstance(node, yaml.CollectionNode) else ()):
            key, value = part if isinstance(node, yaml.MappingNode) else (None, part)
            name = f"{prefix}{key.value if key else i}"
            if key:
                place = f"{path}:{key.start_mark.line + 1}"
                if name in given:
                    raise UserError(f"{place}: {name}: set twice, first at {given[name][0]}: remove one")
                given[name] = (place, text[value.start_mark.index : value.end_mark.index])
            walk(value, f"{name}.")

    walk(root, "")
    return values, given


def read_text(text: str, place: Callable[[int], str], whole: str) -> tuple[yaml.Node | None, Any]:
    """A YAML text's node and value; errors name place(LINE), or the whole where there is no line."""
    try:
        depth = 0
        for event in yaml.parse(text, Loader=Loader):
            here = place(event.start_mark.line + 1)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise UserError(f"{here}: more than {MAX_DEPTH} lists and groups in each other: remove some")
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f"{here}: aliases (*) aren't allowed: write the value out")
            if getattr(event, "tag", None) is not None:
                raise UserError(f"{here}: tags (!) aren't allowed: write the plain value")
            if isinstance(event, yaml.ScalarEvent) and re.search("[\ud800-\udfff]", event.value):
                raise UserError(f"{here}: half a character (a surrogate): remove it")
        loader = Loader(text)
        root = loader.get_single_node()
        return root, loader.construct_document(root) if root else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        hint = "indent with spaces" if "'\\t'" in (error.problem or "") else "compare with `git diff`"
        raise UserError(f"{place(mark.line + 1)}: not valid YAML: {error.problem}: {hint}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{whole}: not valid YAML: {one_line(error)}: compare with `git diff`") from None
