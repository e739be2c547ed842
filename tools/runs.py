"""Every run that Git knows: commits, DVC's experiments and the workspace, with their figures and what made them.

A run is a commit or experiment that changed metrics/eval.json. Nothing is run again or pulled: all of it
is in Git, and nothing is changed. `dvc exp show --json` has settings and figures too, but not the documents, and
takes 0.13 s a commit: 2,000 of them take 4 minutes, and here 10 seconds.
"""

import hashlib
import io
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from sys import intern
from types import MappingProxyType
from typing import Any

from stages.common.errors import UserError

import numpy as np
import yaml

EVAL = "metrics/eval.json"
FILES = {
    "eval": EVAL,
    "details": "metrics/details.json",
    "documents": "metrics/documents.csv",
    "lock": "dvc.lock",
    "run": "metrics/run.json",
}
WORKSPACE = "workspace"
SAMPLE_TEXT = "data/sample/"
SEED = "seed_everything"
UNREADABLE = (yaml.YAMLError, AttributeError, KeyError, TypeError)  # of a dvc.lock
EXPERIMENT = re.compile(r"refs/exps/[0-9a-f]{2}/[0-9a-f]{38}/(.+)")


@dataclass
class Run:
    """A run, as Git and DVC's files in it tell.

    Args:
        revision: full hash, or workspace.
        parent: revision of the nearest earlier run, or None.
        place: workspace, here (on this branch), experiment or elsewhere (on another branch).
        name: of the experiment, else the commit's subject.
        figures, details: eval.json and details.json, by set.
        documents: by set, (rows, 5) float64: document, tokens, bytes, words, nll.
        timing: run.json.
        params, sources: values by dotted name and md5 by path (text and code) from dvc.lock.
        unknown: why dvc.lock doesn't tell these, or None.
        more: what is kept of other files that the caller asked for, by path.
    """

    revision: str
    parent: str | None
    place: str
    name: str
    when: str = ""
    author: str = ""
    merge: bool = False
    cut: bool = False
    figures: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    documents: dict[str, np.ndarray] = field(default_factory=dict)
    timing: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    unknown: str | None = None
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def short(self) -> str:
        return self.revision if self.place == WORKSPACE else self.revision[:7]

    @property
    def label(self) -> str:
        return self.name if self.place == "experiment" else WORKSPACE if self.place == WORKSPACE else self.short

    @property
    def seed(self) -> Any:
        return self.params.get(SEED)

    @cached_property
    def recipe(self) -> str:
        """A hash of settings, text and code, whatever the seed; the revision when they are unknown.

        Of recipes that have made the very same figures, `history` leaves the oldest one's.
        """
        if self.unknown:
            return self.revision
        return recipe_of(self.params, self.sources)

    def number(self, name: str, key: str) -> float:
        """A figure or detail of a set; NaN when it isn't there."""
        return number({**self.part(self.details, name), **self.part(self.figures, name)}, key)

    @staticmethod
    def part(tree: Any, name: str) -> dict:
        found = tree.get(name) if isinstance(tree, dict) else None
        return found if isinstance(found, dict) else {}

    def detail(self, name: str, key: str) -> Any:
        return self.part(self.details, name).get(key)

    def stride(self, name: str) -> Any:
        """Tokens between the starts of two windows of a set; "block_size" where it is known that none overlap."""
        stride = self.detail(name, "stride")
        return "block_size" if stride is not None and stride == self.params.get("model.block_size") else stride


def recipe_of(params: dict[str, Any], sources: dict[str, str]) -> str:
    rest = {key: value for key, value in params.items() if key != SEED}
    return hashlib.sha256(json.dumps([rest, sources], sort_keys=True, default=str).encode()).hexdigest()


def git(*command: str, stdin: bytes | None = None) -> bytes:
    done = subprocess.run(["git", *command], input=stdin, capture_output=True)
    if done.returncode:
        why = done.stderr.decode(errors="replace").strip().split("\n")[0]
        raise UserError(f"git {command[0]}: {why}")
    return done.stdout


def lines(*command: str) -> list[str]:
    return git(*command).decode(errors="replace").splitlines()


def exists(revision: str) -> bool:
    command = ["git", "rev-parse", "--quiet", "--verify", "--end-of-options", f"{revision}^{{commit}}"]
    return subprocess.run(command, capture_output=True).returncode == 0


def history(
    more: Mapping[str, Callable[[bytes | None], Any]] = MappingProxyType({}),
    revisions: tuple[str, ...] = (),
    since: str | None = None,
) -> list[Run]:
    """All runs, newest first: the workspace if it has new figures, commits, experiments.

    Args:
        more: files to read too, and what is kept of each.
        revisions: commits that no branch here need have.
        since: only what came after this revision, and its own run.
    Raises:
        UserError: this is no Git repository.
    """
    cut = lines("rev-parse", "--is-shallow-repository") == ["true"]
    born = exists("HEAD")
    named = experiments()
    here = set(lines("rev-list", "HEAD", "--", EVAL) if born else [])
    old = set(lines("rev-list", since, "--", EVAL)[1:]) if since else set()
    runs = []
    for revision, parents, when, author, subject in log_of_figures([*named, *revisions]) if born else []:
        if revision in old:
            continue
        place = "here" if revision in here else "experiment" if revision in named else "elsewhere"
        parents, name = parents.split(), named.get(revision) or subject or "(no message)"
        row = Run(revision, parents[0] if parents else None, place, name, when, author, len(parents) > 1)
        row.cut = cut and not parents
        runs.append(row)
    files = {**FILES, **{name: name for name in more}}
    contents = read_files([run.revision for run in runs] + ["HEAD"] * born, files)
    runs = [run for run in runs if read(run, next(contents), more)]
    at_head = next(contents) if born else {}
    workspace = {name: Path(path).read_bytes() if Path(path).is_file() else None for name, path in files.items()}
    if workspace["eval"] and workspace["eval"] != at_head.get("eval"):
        newest = next((run.revision for run in runs if run.place == "here"), None)
        run = Run(WORKSPACE, newest, WORKSPACE, "not committed")
        read(run, workspace, more)
        runs.insert(0, run)
    oldest = oldest_recipes([*named, *revisions], workspace["lock"]) if born else {}
    for run in runs:
        run.recipe = oldest.get(run.recipe, run.recipe)
    return runs


def oldest_recipes(more: list[str], workspace: bytes | None) -> dict[str, str]:
    """Of each recipe in a dvc.lock, the oldest that made the same figures, or figures that one of those made.

    Code that is only written otherwise changes no figure, and is no other run: the seeds of before are its seeds.
    """
    what = ["--format=%H", "--date-order", "--reverse", "HEAD", "--branches", "--stdin", "--", FILES["lock"]]
    revisions = git("log", *what, stdin="\n".join(more).encode()).decode().split()
    locks = [files["lock"] for files in read_files(revisions, {"lock": FILES["lock"]})]
    first: dict[str, str] = {}
    older: dict[str, str] = {}

    def oldest(recipe: str) -> str:
        while older[recipe] != recipe:
            recipe = older[recipe]
        return recipe

    for lock in [*locks, workspace]:
        try:
            figures, params, sources = contents_of(lock or b"")
        except UNREADABLE:
            continue
        if figures is not None:
            recipe = recipe_of(params, sources)
            older.setdefault(recipe, recipe)
            older[oldest(recipe)] = oldest(first.setdefault(figures, recipe))
    return {recipe: oldest(recipe) for recipe in older}


def experiments() -> dict[str, str]:
    """The names of DVC's experiments by revision."""
    found = [line.split(" ", 1) for line in lines("for-each-ref", "--format=%(objectname) %(refname)", "refs/exps")]
    return {revision: match[1] for revision, name in found if (match := EXPERIMENT.fullmatch(name))}


def log_of_figures(more: list[str]) -> Iterator[list[str]]:
    """Hash, parents, date, author and subject of each commit that changed the figures, newest first."""
    # --parents makes %P the nearest earlier commits that changed the file.
    fields = ("%H", "%P", "%cd", "%aN", "%s")
    shape = ["--no-show-signature", "--encoding=UTF-8", "--date=format:%Y-%m-%d %H:%M"]
    what = [f"--format={'%x00'.join(fields)}", "HEAD", "--branches", "--stdin", "--", EVAL]
    log = git("log", "-z", "--date-order", "--parents", *shape, *what, stdin="\n".join(more).encode())
    parts = log.decode(errors="replace").removesuffix("\0").split("\0")
    for i in range(0, len(parts) - 1, len(fields)):
        yield parts[i : i + len(fields)]


def read_files(revisions: list[str], files: dict[str, str]) -> Iterator[dict[str, bytes | None]]:
    """The files of one revision after the other, None where one is missing, all from one Git process."""
    with tempfile.TemporaryFile() as names:
        names.writelines(f"{revision}:./{path}\n".encode() for revision in revisions for path in files.values())
        names.seek(0)
        command = ["git", "cat-file", "--batch"]
        with subprocess.Popen(command, stdin=names, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            for _ in revisions:
                yield {name: read_object(process.stdout) for name in files}


def read_object(stream: io.BufferedReader) -> bytes | None:
    header = stream.readline().split()
    if not header or header[-1] == b"missing":
        return None
    content = stream.read(int(header[-1]))
    stream.read(1)
    return content


def read(run: Run, files: dict[str, bytes | None], more: Mapping[str, Callable] = MappingProxyType({})) -> bool:
    """Fills a run from its files; False when it has no figures (the commit that removed them)."""
    if not files["eval"]:
        return False
    trees = (read_json(files[name]) for name in ("eval", "details", "run"))
    run.figures, run.details, run.timing = (tree if isinstance(tree, dict) else {} for tree in trees)
    run.documents = read_documents(files["documents"])
    run.unknown, run.params, run.sources = read_lock(files["lock"], files["eval"])
    run.more = {name: keep(files[name]) for name, keep in more.items()}
    return True


def read_json(raw: bytes | None) -> Any:
    try:
        return json.loads(raw or b"null")
    except ValueError:
        return None


def read_documents(raw: bytes | None) -> dict[str, np.ndarray]:
    numbers = read_columns(raw, "document", "tokens", "bytes", "words", "nll")
    names = [line.split(",", 1)[0] for line in rows_of(raw)[1:]]
    return {name: numbers[[each == name for each in names]] for name in dict.fromkeys(names) if len(numbers)}


def read_columns(raw: bytes | None, *names: str) -> np.ndarray:
    """Columns of numbers of a CSV file: (rows, names) float64; no rows where they aren't there."""
    rows = rows_of(raw)
    try:
        places = [rows[0].split(",").index(name) for name in names]
        # Of small files ten times as fast as pandas.
        return np.loadtxt(rows, delimiter=",", skiprows=1, usecols=places, ndmin=2, comments=None)
    except (ValueError, IndexError):
        return np.empty((0, len(names)))


def rows_of(raw: bytes | None) -> list[str]:
    return [line for line in (raw or b"").decode(errors="replace").splitlines() if line]


def number(tree: Any, *keys: str) -> float:
    """A figure in a tree of figures; NaN when it isn't there or isn't a finite number."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return float(tree) if isinstance(tree, int | float) and math.isfinite(tree) else math.nan


def read_lock(raw: bytes | None, figures: bytes) -> tuple[str | None, dict[str, Any], dict[str, str]]:
    """Why nothing is known or None, settings by dotted name, md5 by path of what no stage made."""
    if raw is None:
        return "no dvc.lock", {}, {}
    try:
        made, params, sources = contents_of(raw)
    except UNREADABLE:
        return "dvc.lock can't be read", {}, {}
    if made != hashlib.md5(figures, usedforsecurity=False).hexdigest():
        return "dvc.lock records other figures", {}, {}
    return None, params, sources


def contents_of(raw: bytes) -> tuple[str | None, dict[str, Any], dict[str, str]]:
    """What a dvc.lock records: md5 of the figures, settings by dotted name, md5 by path of what no stage made."""
    hashes, params, outs = {}, {}, set()
    for part in parts_of(raw):
        for entry in part.get("deps", []) + part.get("outs", []):
            hashes[entry["path"]] = entry.get("md5")
        outs.update(entry["path"] for entry in part.get("outs", []))
        for file in part.get("params", {}).values():
            flatten(file or {}, "", params)
    made = {path for path in hashes if any(path == out or path.startswith(f"{out}/") for out in outs)}
    return hashes.get(EVAL), params, {path: md5 for path, md5 in hashes.items() if path not in made}


def parts_of(lock: bytes) -> list[dict[str, Any]]:
    """What a dvc.lock says of its stages, each one's deps, params and outs by themselves: most are those of another
    commit, and read already."""
    parts = re.split(rb"^(?=  (?:  )?\w)", lock.partition(b"stages:\n")[2], flags=re.MULTILINE)
    return [read_yaml(part) or {} for part in parts]


@lru_cache(maxsize=256)
def read_yaml(raw: bytes) -> Any:
    return yaml.load(raw, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def flatten(tree: Any, prefix: str, into: dict[str, Any]) -> None:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flatten(value, f"{prefix}{key}.", into)
        else:
            into[intern(f"{prefix}{key}")] = value


def find(name: str, runs: list[Run]) -> Run:
    """The run of a revision or experiment: its own, or the nearest one before it.

    Raises:
        UserError: there is none.
    """
    for run in runs:
        if name == WORKSPACE and run.place in (WORKSPACE, "here") or run.place == "experiment" and run.name == name:
            return run
    # An experiment may have the very figures of the run before it.
    revision = {name: revision for revision, name in experiments().items()}.get(name, name)
    if name != WORKSPACE and not exists(revision):
        raise UserError(
            f"{name}: no such revision or experiment here: `git fetch`, or `dvc exp pull origin {name}`, brings one"
        )
    by_revision = {run.revision: run for run in runs}
    found = [] if name == WORKSPACE else lines("rev-list", "-1", revision, "--", EVAL)
    if not found or found[0] not in by_revision:
        raise UserError(f"{name}: has no figures: run `dvc repro`, then `git add -A` and `git commit`")
    return by_revision[found[0]]


def revisions_of(names: list[str]) -> tuple[str, ...]:
    """The commits that names stand for, of those that are revisions."""
    return tuple(lines("rev-parse", f"{name}^{{commit}}")[0] for name in names if name != WORKSPACE and exists(name))
