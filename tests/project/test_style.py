"""How the product is written, as far as a test can hold it."""

import ast
from collections.abc import Iterator

import pytest
from conftest import ROOT

LONGEST = 40  # lines of a function
PRODUCT = sorted(file for room in ("stages", "tools") for file in (ROOT / room).rglob("*.py"))


def functions(tree: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef]:
    """Those of a module and its classes, not those inside of others."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from functions(node)
        elif isinstance(node, ast.FunctionDef):
            yield node


@pytest.mark.parametrize("file", PRODUCT, ids=lambda file: str(file.relative_to(ROOT)))
def test_public_functions_have_types(file):
    for node in functions(ast.parse(file.read_text())):
        if node.name == "__init__" or not node.name.startswith("_"):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            arguments += [each for each in (node.args.vararg, node.args.kwarg) if each]
            bare = [each.arg for each in arguments if each.annotation is None and each.arg not in ("self", "cls")]
            assert not bare, f"{node.name}: no type: {', '.join(bare)}"
            assert node.returns or node.name == "__init__", f"{node.name}: no type of what it returns"


@pytest.mark.parametrize("file", [file for file in PRODUCT if "stages" in file.parts], ids=lambda file: file.stem)
def test_a_long_function_says_why(file):
    source = file.read_text()
    for node in functions(ast.parse(source)):
        lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
        if len(lines) > LONGEST:
            why = [line for line in lines if line.strip().startswith("# Long because ")]
            assert why, f"{node.name}: {len(lines)} lines: split it, or say `# Long because ...` inside it"
