"""`dvc exp`: one run, a queued grid, `--temp` without the environment on PATH; shown, applied, branched."""

import csv
import io
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import in_terminal, once, run


def experiments(project: Path) -> dict[str, dict]:
    """The rows of `dvc exp show`, by the name of the experiment or revision."""
    table = csv.DictReader(io.StringIO(run("dvc", "exp", "show", "--csv", cwd=project).stdout))
    return {row["Experiment"] or row["rev"]: row for row in table}


@pytest.fixture(scope="module")
def explored(built, warm, tmp_path_factory) -> Path:
    """The built project with a grid of two run in the queue's folders, and one experiment in place."""

    def make(project: Path) -> None:
        shutil.copytree(built, project)
        warm("dvc", "exp", "run", "--queue", "--name", "grid", "-S", "optimizer.lr=3e-4,1e-3", cwd=project)
        warm("dvc", "queue", "start", cwd=project)
        deadline = time.monotonic() + 900
        while True:
            status = warm("dvc", "queue", "status", cwd=project).stdout
            if "Queued" not in status and "Running" not in status:
                break
            assert time.monotonic() < deadline, status
            time.sleep(3)
        warm("dvc", "queue", "stop", cwd=project)
        assert status.count("Success") == 2, status
        warm("dvc", "exp", "run", "--name", "deeper", "-S", "model.n_layer=3", cwd=project)

    own = tmp_path_factory.mktemp("explored") / "project"
    return shutil.copytree(once(tmp_path_factory, "explored", make), own, symlinks=True)


def test_exp_show_compares_them(explored):
    rows = experiments(explored)
    assert {row["model.n_layer"] for row in rows.values()} == {"2", "3"}
    assert rows["deeper"]["model.n_layer"] == "3"
    assert {float(row["optimizer.lr"]) for row in rows.values()} == {4e-3, 3e-4, 1e-3}
    figures = [row["test.ppl"] for name, row in rows.items() if name not in ("workspace", "main")]
    assert len(set(figures)) == 3 and all(float(figure) > 1 for figure in figures)


def test_tables_show_the_test_figures_in_a_terminal(explored):
    lines = run("dvc", "metrics", "show", cwd=explored).stdout.splitlines()
    assert len(lines) == 2 and max(map(len, lines)) <= 120 and "test.ppl" in lines[0]
    shown = re.sub(r"\x1b\[[\d;]*m", "", in_terminal(150, "dvc", "exp", "show", cwd=explored))
    header = next(line[:150] for line in shown.splitlines() if "Experiment" in line)
    assert [word for word in header.split() if "." in word][:3] == ["test.ppl", "test.bits_per_byte", "test.loss"]


def test_queued_runs_share_the_cache(explored):
    """What they made can be had from the project's cache alone."""
    (name,) = [name for name, row in experiments(explored).items() if row["optimizer.lr"] == "0.001"]
    run("dvc", "exp", "apply", name, cwd=explored)
    assert "up to date" in run("dvc", "status", cwd=explored).stdout
    assert (explored / "models/gpt2/model.safetensors").exists()
    run("git", "checkout", "-q", ".", cwd=explored)
    run("dvc", "checkout", cwd=explored)


def test_exp_branch(explored, tmp_path):
    expected = experiments(explored)["deeper"]
    run("dvc", "exp", "branch", "deeper", "three-layers", cwd=explored)
    run("git", "clone", "-q", "-b", "three-layers", str(explored), "clone", cwd=tmp_path)
    row = experiments(tmp_path / "clone")["three-layers"]
    assert (row["model.n_layer"], row["test.ppl"]) == ("3", expected["test.ppl"])


def test_temp_run_without_the_environment_on_path(project, tmp_path):
    """`.venv/bin/dvc` finds the packages, also below .dvc/tmp, and a text that DVC alone tracks comes along."""
    (project / ".venv").symlink_to(sys.prefix)
    (project / ".git/info/exclude").write_text("/.venv\n")
    run("git", "rm", "-q", "--cached", "data/test.txt", cwd=project)
    run("dvc", "add", "-q", "data/test.txt", cwd=project)
    run("git", "add", "-A", cwd=project)
    run("git", "commit", "-qm", "the test text in DVC", cwd=project)
    # A Python of the same version that has none of the packages.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(Path(sys._base_executable).resolve())
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
    environment.pop("VIRTUAL_ENV", None)
    command = [".venv/bin/dvc", "exp", "run", "--temp", "-S", "evaluate.stride=8", "--name", "overlap"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert experiments(project)["overlap"]["evaluate.stride"] == "8"
