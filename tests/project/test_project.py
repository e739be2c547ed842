"""What a clone of this repository promises before anything has run, and make."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import stat
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, copy_checkout, run


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A fresh clone of this checkout."""
    source = copy_checkout(tmp_path_factory.mktemp("origin") / "project")
    run("git", "add", "-A", cwd=source)
    run("git", "commit", "-qm", "all", cwd=source)
    target = tmp_path_factory.mktemp("fresh") / "clone"
    run("git", "clone", "-q", str(source), str(target), cwd=source)
    return target


def test_fresh_clone_shows_the_committed_figures(clone):
    shown = json.loads(run("dvc", "metrics", "show", "--json", cwd=clone).stdout)[""]["data"]
    for name in ("eval", "run"):
        assert shown[f"metrics/{name}.json"]["data"] == json.loads((ROOT / f"metrics/{name}.json").read_text())
    assert {"loss", "ppl", "bits_per_byte", "word_ppl", "tokens", "bytes"} <= shown["metrics/eval.json"]["data"][
        "test"
    ].keys()


def test_fresh_clone_has_what_a_rerun_is_checked_against(clone):
    assert (clone / "dvc.lock").is_file()
    assert run("dvc", "config", "core.analytics", cwd=clone).stdout.strip() == "false"


def test_outputs_are_not_in_git(built):
    tracked = run("git", "ls-files", cwd=built).stdout.splitlines()
    outputs = ("data/sample/", "data/blocks/", "models/tokenizer/", "models/gpt2/", "models/checkpoints/", "logs/")
    assert not [name for name in tracked if name.startswith(outputs)]


def test_a_run_leaves_nothing_unknown(project):
    """What `make repro` writes is an output of DVC, tracked by Git, or ignored."""
    assert run("git", "status", "--porcelain", cwd=project).stdout == ""


def requirements() -> dict[str, str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?==([\w.]+)", line) for line in lines]
    assert all(pins), [line for line, pin in zip(lines, pins) if not pin]
    return {pin[1].lower().replace("_", "-"): pin[2] for pin in pins}


def test_requirements_are_pinned_and_installed():
    for name, version in requirements().items():
        assert importlib.metadata.version(name).split("+")[0] == version


def test_requirements_name_what_the_code_imports():
    packages = importlib.metadata.packages_distributions()
    own = {"conftest", *(path.stem for path in [*ROOT.glob("*/"), *ROOT.glob("tests/*.py"), *ROOT.glob("docs/*.py")])}
    for file in [*ROOT.glob("stages/*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("docs/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            modules = [node.module] if isinstance(node, ast.ImportFrom) else modules
            for module in {module.split(".")[0] for module in modules} - own - set(sys.stdlib_module_names):
                owners = {name.lower().replace("_", "-") for name in packages.get(module, [module])}
                assert owners & requirements().keys(), f"{file.name} imports {module}: add it to requirements.txt"


# make -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["repro", "test"])
def test_make_installs_when_requirements_are_newer(clone, target, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(clone, project)
    assert "pip install" in run("make", "-n", target, cwd=project).stdout

    (project / ".venv").mkdir()
    (project / ".venv/installed").touch()
    assert "pip install" not in run("make", "-n", target, cwd=project).stdout

    later = time.time() + 10
    os.utime(project / "requirements.txt", (later, later))
    assert "pip install" in run("make", "-n", target, cwd=project).stdout


def test_make_runs_dvc_repro_in_the_environment(clone, tmp_path):
    """The commands of the pipeline come from .venv, whatever else is on the PATH."""
    project = tmp_path / "project"
    shutil.copytree(clone, project)
    (project / ".venv/bin").mkdir(parents=True)
    (project / ".venv/installed").touch()
    script = project / ".venv/bin/dvc"
    script.write_text("#!/bin/sh\necho in .venv: dvc $*\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    assert "in .venv: dvc repro" in run("make", "repro", cwd=project).stdout


def test_make_says_that_python_is_too_old(clone, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(clone, project)
    old = tmp_path / "old-python"
    pretend = "import sys; sys.version_info = (3, 10, 9); exec(sys.argv[1])"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{pretend}" "$2"\n')
    old.chmod(0o755)
    done = run("make", "repro", f"PYTHON={old}", cwd=project, check=False)
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed" in done.stderr
    assert not (project / ".venv").exists()

    done = run("make", "repro", "PYTHON=no-such-python", cwd=project, check=False)
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed" in done.stderr
