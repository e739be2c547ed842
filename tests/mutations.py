"""Puts small faults into the code, one at a time, and sees whether the tests of its room notice.

    python tests/mutations.py --seed 1 --each 9

A fault is one line changed: a comparison, an operator, a condition, a number, an argument or a statement left out.
The seed draws as many in each room. Each is tried in a fork of one process that has the libraries loaded: the
stages that the room is in run anew on a small project, then the quick tests of the room until one fails.
It prints the table of docs/reliability.md, and each fault that no test noticed.
"""

import argparse
import ast
import gc
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import conftest
import pytest
from warm import import_libraries

# The stages that a room is part of, and for each of its files the tests that should notice.
TEXT = ["prepare_corpus", "train_tokenizer", "tokenize_blocks", "train", "evaluate"]
TOKENS = "text/token_definitions text/tokenizers model/evaluate"
SETTINGS = "common/settings project/inputs"
RESUME = "training/resume::test_stopped_at_every_step[accumulate]"
CLEAN = "training/resume::test_clean_leaves_a_training_at_work"
ROOMS = {
    "stages": (TEXT, {
        "prepare_corpus": "text/corpus",
        "train_tokenizer": TOKENS,
        "tokenize_blocks": TOKENS,
        "train": "training/definitions training/figures training/training",
        "evaluate": "model/evaluate model/gpt2 training/finished training/definitions",
    }),
    "stages/common": (TEXT, {
        "checkpoint_files": "training/parts",
        **dict.fromkeys(("commands", "errors", "hub", "memory", "params", "plain_yaml", "settings"), SETTINGS),
        "devices": "common/settings model/evaluate",
        "files": "common/files project/inputs",
        "processes": "training/launchers",
    }),
    "stages/text": (TEXT, {
        **dict.fromkeys(("corpus", "leakage", "splits"), "text/corpus"),
        **dict.fromkeys(("encoding", "streams", "tokenizers"), TOKENS),
        **dict.fromkeys(("engine", "measures", "sources"), "text/corpus text/engine"),
        "shards": "text/shards",
    }),
    "stages/model": (["train", "evaluate"], {
        "gpt2": "model/gpt2 model/ops tools/generate training/definitions project/inputs",
        "intervals": "tools/compare model/evaluate",
        "ops": "model/ops",
        "optimizers": "model/optimizers training/definitions training/training",
        "sampling": "model/gpt2 tools/generate",
        "scoring": "model/gpt2 model/evaluate",
    }),
    "stages/training": (["train"], {
        "best": "training/figures training/training",
        "checkpoints": f"training/definitions training/finished {RESUME} {CLEAN}",
        "data": "training/definitions training/training",
        "history": f"training/definitions training/training {RESUME}",
        "identity": "training/definitions",
        "lightning_internals": f"training/lightning_internals {RESUME}",
        "model_card": "training/definitions training/figures project/share",
        "module": "training/definitions training/training training/figures",
        **dict.fromkeys(("parts", "sharded"), "training/parts training/scale"),
        "trainer": "training/figures project/inputs",
    }),
    "stages/watch": (["train"], {
        "progress": f"watch/history {RESUME}",
        "summary": "watch/history training/definitions",
    }),
    "tools": ([], {
        "checkpoints": CLEAN,
        **dict.fromkeys(("compare", "verdict", "runs"), "tools/compare tools/report"),
        **{name: f"tools/{name}" for name in ("curve", "export", "generate", "plan", "report")},
    }),
}  # fmt: skip
SLOW = (
    "through_dvc dvc_itself network compiled peak_memory held_out_by_their_text japanese any_bytes_train terminal "
    "what_is_asked git_without real_process costs_nothing mistakes_are_one_line two_trainings full_disk buckets"
)
QUICK = " and ".join(f"not {name}" for name in SLOW.split())
SWAPS = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"), ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "//"), ast.And: ("and", "or"), ast.Or: ("or", "and"),
}  # fmt: skip


@dataclass
class Fault:
    """A line of a file, numbered from 1, and what stands there instead."""

    file: str
    line: int
    before: str
    after: str


def faults(file: str, source: str, seed: str) -> Iterator[Fault]:
    """The faults that a file can have, in an order that the seed decides."""
    tree, lines = ast.parse(source), source.split("\n")
    skip = {part for node in ast.walk(tree) if is_not_tried(node) for part in ast.walk(node)}
    found = [edit for node in ast.walk(tree) if node not in skip for edit in edits(node)]
    for (number, start), (last, end), change in random.Random(f"{seed} {file}").sample(found, len(found)):
        raw = lines[number - 1].encode()
        after = (raw[:start] + change(raw[start:end].decode()).encode() + raw[end:]).decode()
        if number == last and changes_what_runs(tree, [*lines[: number - 1], after, *lines[number:]]):
            yield Fault(file, number, lines[number - 1], after)


def is_not_tried(node: ast.AST) -> bool:
    """Texts for people, types, and what only `python -m` runs."""
    return (
        isinstance(node, ast.JoinedStr | ast.arg) or isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
    )


def changes_what_runs(tree: ast.Module, lines: list[str]) -> bool:
    try:
        return ast.dump(ast.parse("\n".join(lines))) != ast.dump(tree)
    except SyntaxError:
        return False


def edits(node: ast.AST) -> Iterator[tuple]:
    """What of a node can be changed: from (line, column), to (line, column), and its old text to the new one."""
    if isinstance(node, ast.Compare):
        yield between(node.left, node.comparators[0], node.ops[0])
    elif isinstance(node, ast.BinOp) and not any(is_text(part) for part in (node.left, node.right)):
        yield between(node.left, node.right, node.op)
    elif isinstance(node, ast.BoolOp):
        yield between(*node.values[:2], node.op)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield start(node), end(node), lambda text: str(text != "True")
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        other = node.value + 1 if isinstance(node.value, int) else 2 * node.value
        yield start(node), end(node), lambda text: repr(other)
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        yield start(node.test), end(node.test), lambda text: f"not ({text})"
    elif isinstance(node, ast.Call):
        before = node.args[-1:]
        for keyword in node.keywords:
            if before:
                yield end(before[0]), end(keyword), lambda text: ""
            before = [keyword]
    elif is_action(node):
        yield start(node), end(node), lambda text: "pass"


def between(left: ast.AST, right: ast.AST, operator: ast.AST) -> tuple:
    old, new = SWAPS.get(type(operator), ("", ""))
    return end(left), start(right), lambda text: text.replace(old, new, 1)


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def is_action(node: ast.AST) -> bool:
    """Whether a statement can be left out and no name is missing for it."""
    if isinstance(node, ast.Assign):
        return isinstance(node.targets[0], ast.Attribute | ast.Subscript)
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant)
    return isinstance(node, ast.AugAssign | ast.Raise | ast.Continue | ast.Break | ast.Delete)


def start(node: ast.AST) -> tuple[int, int]:
    return node.lineno, node.col_offset


def end(node: ast.AST) -> tuple[int, int]:
    return node.end_lineno, node.end_col_offset


def path_of(name: str) -> str:
    file, *test = name.split("::")
    return "::".join([f"tests/{file.replace('/', '/test_')}.py", *test])


def drawn(root: Path, room: str, seed: int, count: int) -> list[Fault]:
    """So many faults in the files of a room, each line as likely as any other."""
    sources = {f"{room}/{name}.py": Path(root, room, f"{name}.py").read_text() for name in ROOMS[room][1]}
    rest = {file: faults(file, source, str(seed)) for file, source in sources.items()}
    lengths = [source.count("\n") for source in sources.values()]
    files = random.Random(f"{seed} {room}").choices(list(sources), lengths, k=count)
    return [next(rest[file]) for file in files]


class Trial:
    """Runs tests in forks, in which a fault is there."""

    def __init__(self, folder: Path, checkout: Path, template: Path, built: Path):
        """
        Args:
            folder: for what the tests write.
            checkout: a copy of this one.
            template, built: of tests/conftest.py.
        """
        self.folder, self.checkout, self.template, self.built = folder, checkout, template, built

    def noticed(self, fault: Fault | None, stages: list[str], tests: list[str], seconds: int) -> str:
        """The first test that fails, "time" when they take too long, "died" when the process does, or nothing."""
        files = [root / fault.file for root in {self.checkout, self.template, self.built}] if fault else []
        before = [file.read_text() for file in files]
        for file, source in zip(files, before):
            lines = source.split("\n")
            assert lines[fault.line - 1] == fault.before
            lines[fault.line - 1] = fault.after
            file.write_text("\n".join(lines))
        try:
            return self.forked(stages, tests, seconds)
        finally:
            for file, source in zip(files, before):
                file.write_text(source)

    def forked(self, stages: list[str], tests: list[str], seconds: int) -> str:
        reader, writer = os.pipe()
        if child := os.fork():
            os.close(writer)
            with os.fdopen(reader) as file:
                result = file.read() or "died"
            os.waitpid(child, 0)
            return result.removeprefix("passed")
        try:
            os.setsid()
            signal.signal(signal.SIGALRM, lambda *_: (os.write(writer, b"time"), os.killpg(0, signal.SIGKILL)))
            signal.alarm(seconds)
            log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1), os.dup2(log, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            os.chdir(self.checkout)
            for name in [name for name in sys.modules if name.split(".")[0] in ("stages", "tools", "conftest")]:
                del sys.modules[name]
            sys.path[:] = [str(self.checkout), str(self.checkout / "tests"), *sys.path[1:]]
            watch = Watch(self, stages)
            options = f"-x -q -p no:cacheprovider -p no:xdist --basetemp={self.folder}/tests".split()
            status = pytest.main([*options, "-k", QUICK, *tests], plugins=[watch])
            os.write(writer, (watch.failed or [f"exit {status}" if status else "passed"])[0].encode())
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(0)


class Watch:
    """Gives the tests of a fork the projects that were built before it, `built` by the stages as they are now."""

    def __init__(self, trial: Trial, stages: list[str]):
        self.trial, self.stages, self.failed = trial, stages, []

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(self, fixturedef, request):
        if fixturedef.argname not in ("template", "built"):
            return None
        project = self.trial.template if fixturedef.argname == "template" else self.rebuilt(request)
        fixturedef.cached_result = (project, fixturedef.cache_key(request), None)
        return project

    def rebuilt(self, request) -> Path:
        project = request.getfixturevalue("tmp_path_factory").mktemp("built") / "project"
        shutil.copytree(self.trial.built, project)
        for stage in self.stages:
            status, _, err = sys.modules["conftest"].run_stage(project, stage)
            assert status == 0, err
        shutil.rmtree(project / "models/checkpoints", ignore_errors=True)
        return project

    def pytest_runtest_logreport(self, report):
        self.failed.extend([report.nodeid] if report.failed else [])

    def pytest_collectreport(self, report):
        self.failed.extend([report.nodeid or "collection"] if report.failed else [])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/mutations.py", description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=1, help="of which faults")
    parser.add_argument("--each", type=int, default=9, help="how many faults in each room")
    parser.add_argument("--room", choices=ROOMS, action="append", help="only in these rooms")
    arguments = parser.parse_args()
    import_libraries(conftest.ROOT / "stages")
    sys.path.insert(0, str(conftest.ROOT))
    with tempfile.TemporaryDirectory() as folder:
        checkout, template = conftest.copy_checkout(Path(folder, "checkout")), Path(folder, "template")
        built = Path(shutil.copytree(conftest.small_project(template), Path(folder, "built")))
        for command in (("dvc", "repro"), ("git", "add", "-A"), ("git", "commit", "-qm", "built")):
            conftest.run(*command, cwd=built)
        trial, rows = Trial(Path(folder), checkout, template, built), []
        gc.freeze()
        limits = {}
        for room in arguments.room or ROOMS:
            stages, tests_of = ROOMS[room]
            count = 0
            for fault in drawn(checkout, room, arguments.seed, arguments.each):
                tests = [path_of(name) for name in tests_of[Path(fault.file).stem].split()]
                if (room, *tests) not in limits:
                    began = time.monotonic()
                    assert not (why := trial.noticed(None, stages, tests, 600)), (
                        why,
                        (trial.folder / "log").read_text(),
                    )
                    limits[room, *tests] = 30 + round(3 * (time.monotonic() - began))
                by = trial.noticed(fault, stages, tests, limits[room, *tests])
                count += bool(by)
                change = f"`{fault.before.strip()}` > `{fault.after.strip()}`"
                print(f"{fault.file}:{fault.line}: {change}: {by or 'NOT NOTICED'}", flush=True)
            rows.append(f"| `{room}/` | {arguments.each} | {count} |")
    print("\n| room | faults | noticed |\n| --- | --- | --- |", *rows, sep="\n")


if __name__ == "__main__":
    main()
