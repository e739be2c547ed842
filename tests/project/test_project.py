"""What a clone of this repository promises before anything has run, and make."""

import ast
import importlib.metadata
import json
import os
import platform
import re
import shutil
import stat
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, copy_checkout, run
from packaging.requirements import Requirement


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
    assert list(shown) == ["metrics/eval.json"]
    assert shown["metrics/eval.json"]["data"] == json.loads((ROOT / "metrics/eval.json").read_text())
    assert list(shown["metrics/eval.json"]["data"]["test"]) == ["ppl", "bits_per_byte", "loss"]


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


def pins(file: str) -> dict[str, str]:
    """The versions in a file of requirements by the name of the package; each is pinned."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and line[0] != "#"]
    found = [re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?==([\w.]+)(; .*)?", line) for line in lines]
    assert all(found), [line for line, pin in zip(lines, found) if not pin]
    return {re.sub(r"[._]", "-", pin[1].lower()): pin[2] for pin in found}


RUN, DEV, LOCK = pins("requirements.txt"), pins("requirements-dev.txt"), pins("requirements.lock")


def test_requirements_are_installed():
    for name, version in (RUN | DEV).items():
        if name != "fastokens" or (sys.platform, platform.machine()) == ("linux", "x86_64"):
            assert importlib.metadata.version(name).split("+")[0] == version, name


def test_lock_pins_all_that_is_required():
    """What the requirements name, and what those packages need in turn, wherever they are installed."""
    assert (ROOT / "requirements.lock").read_text().startswith("# make lock")
    names = {
        f"{file}: {name}": version for file, found in (("run", RUN), ("dev", DEV)) for name, version in found.items()
    }
    assert {name: LOCK.get(name.split(": ")[1]) for name in names} == names, "run `make lock`"
    for name in LOCK:
        for needed in map(Requirement, importlib.metadata.requires(name) or []) if installed(name) else []:
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert re.sub(r"[._]", "-", needed.name.lower()) in LOCK, f"{name} needs {needed.name}: run `make lock`"


def installed(name: str) -> bool:
    return bool(list(importlib.metadata.distributions(name=name)))


def test_requirements_name_what_the_code_imports():
    """The pipeline and its tools need nothing of requirements-dev.txt."""
    packages = importlib.metadata.packages_distributions()
    tests = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py")]
    code = [file for glob in ("stages/**/*.py", "tools/*.py", "docs/*.py", ".github/*.py") for file in ROOT.glob(glob)]
    own = {file.stem for file in tests + code} | {"stages", "tools", "benchmarks"} | set(sys.stdlib_module_names)
    for file in tests + code:
        named = RUN | DEV if file in tests else RUN
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            modules = [node.module] if isinstance(node, ast.ImportFrom) else modules
            for module in {module.split(".")[0] for module in modules} - own:
                owners = {re.sub(r"[._]", "-", name.lower()) for name in packages.get(module, [module])}
                assert owners & named.keys(), f"{file.name} imports {module}: add it to requirements.txt"


# make -------------------------------------------------------------------------------------------


def test_make_lists_its_targets(clone):
    shown = run("make", cwd=clone).stdout
    assert re.findall(r"^make (\w+) ", shown, re.M) == [
        "setup",
        "repro",
        "report",
        "seeds",
        "curve",
        "test",
        "bench",
        "lock",
    ]
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize("target", ["setup", "repro", "test"])
@pytest.mark.parametrize("file", ["requirements.txt", "requirements.lock"])
def test_make_installs_when_requirements_are_newer(clone, target, file, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(clone, project)
    fresh = run("make", "-n", target, cwd=project).stdout
    assert "-r requirements.txt -c requirements.lock" in fresh
    assert ("-r requirements-dev.txt" in fresh) == (target == "test")
    assert ("dvc repro" in fresh) == (target == "repro")

    (project / ".venv/bin").mkdir(parents=True)
    for name in ("bin/python", "installed", "installed-dev"):
        (project / ".venv" / name).touch()
    assert "pip install" not in run("make", "-n", target, cwd=project).stdout

    later = time.time() + 10
    os.utime(project / file, (later, later))
    assert "pip install" in run("make", "-n", target, cwd=project).stdout


def test_make_runs_dvc_repro_in_the_environment(clone, tmp_path):
    """The commands of the pipeline come from .venv, whatever else is on the PATH."""
    project = tmp_path / "project"
    shutil.copytree(clone, project)
    (project / ".venv/bin").mkdir(parents=True)
    (project / ".venv/bin/python").touch()
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


@pytest.mark.skipif(platform.system() != "Linux", reason="GNU's OpenMP is that of torch for Linux")
def test_threads_that_wait_let_others_run():
    def spins(*environment, modules="stages.common, torch"):
        plain = ["env", "-u", "GOMP_SPINCOUNT", "-u", "OMP_WAIT_POLICY", "OMP_DISPLAY_ENV=verbose", *environment]
        said = run(*plain, sys.executable, "-c", f"import {modules}", cwd=ROOT).stderr
        return set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", said))

    assert spins(modules="stages.train") == {"100000"}
    assert spins("OMP_WAIT_POLICY=passive") == {"0"}
    assert spins("GOMP_SPINCOUNT=7") == {"7"}
