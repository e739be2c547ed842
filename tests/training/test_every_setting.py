"""The table of docs/resume.md, tried: a run stopped by SIGTERM, then SIGKILL, ends with the bytes of a whole one."""

import re
import shutil
import signal
from pathlib import Path

import pytest
from conftest import ROOT, set_params, train_inputs
from forks import forked
from test_resume import made

TABLE = re.findall(
    r"^\| `([\w.]+)` \| `(.+?)` \| (exact|refused|not exact)\b.*\|$", (ROOT / "docs/resume.md").read_text(), re.M
)
BASE = [
    "model.block_size=64",
    "model.n_layer=1",
    "optimizer.batch_size=8",
    "trainer.max_epochs=2",
    "runtime.enable_progress_bar=false",
    "runtime.checkpoint_every_n_minutes=0",
]
EVERY = "--runtime.checkpoint_every_n_steps=3"


@pytest.fixture(scope="module")
def fresh(built, tmp_path_factory) -> Path:
    """What the train stage reads: few blocks, so that an epoch is a dozen steps."""
    project = train_inputs(built, tmp_path_factory.mktemp("every") / "project")
    set_params(project, *BASE)
    shutil.copy(ROOT / "tests/probe.py", project / "my_callbacks.py")
    return project


def copy_of(fresh: Path, target: Path) -> Path:
    shutil.copytree(fresh, target)
    return target


@pytest.mark.parametrize("key, value, promise", TABLE, ids=[f"{key}={value[:40]}" for key, value, _ in TABLE])
def test_setting(fresh, tmp_path, key, value, promise):
    setting = f"--{key}={value}"
    whole = copy_of(fresh, tmp_path / "whole")
    status = forked(whole, setting)
    log = (whole / "train.log").read_text()
    if promise == "refused":
        assert status == 1 and re.search(r"^error: [^\n]+\Z", log.strip(), re.M), log
        assert not (whole / "models/gpt2").exists()
        return
    assert status == 0, log
    if promise == "not exact":
        return
    stopped = copy_of(fresh, tmp_path / "stopped")
    every = [] if key.startswith("runtime.checkpoint") else [EVERY]
    assert forked(stopped, setting, *every, kill=(signal.SIGTERM, 5)) == 128 + signal.SIGTERM
    assert forked(stopped, setting, *every, kill=(signal.SIGKILL, 10)) == -signal.SIGKILL
    assert list(stopped.glob("models/checkpoints/*/step-*.ckpt"))
    assert forked(stopped, setting, *every) == 0, (stopped / "train.log").read_text()
    assert "going on from" in (stopped / "train.log").read_text()
    assert made(stopped) == made(whole)
    assert {name.split("/")[-1] for name in made(whole)} >= {"model.safetensors", "README.md", "train.csv"}
