"""The table of docs/resume.md, tried: a run stopped by SIGTERM, then SIGKILL, ends with the bytes of a whole one."""

import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path

from stages import train, train_tokenizer
from stages.training.checkpoints import Checkpoints

import pytest
from conftest import ROOT, digests, run_stage, set_params, train_inputs
from forks import end, forked, start
from pytorch_lightning.callbacks import Timer
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
    holds(fresh, tmp_path, promise, [EVERY] if not key.startswith("runtime.checkpoint") else [], f"--{key}={value}")


@pytest.mark.parametrize(
    "settings",
    [
        ("{monitor: valid_loss, stopping_threshold: 99}", "--trainer.min_steps=15", "--trainer.val_check_interval=10"),
        ("{monitor: valid_loss, check_on_train_epoch_end: true}", "--trainer.val_check_interval=10"),
    ],
    ids=["an end that min_steps puts off", "a metric of before"],
)
def test_early_stopping_remembers(fresh, tmp_path, settings):
    stopping = f"--trainer.callbacks=[{{class_path: EarlyStopping, init_args: {settings[0]}}}]"
    holds(fresh, tmp_path, "exact", [EVERY], stopping, *settings[1:], second=14)  # after the epoch's one validation


def test_time_that_is_over_before_the_next_step(fresh, tmp_path):
    hour, begin = "--trainer.max_time=00:01:00:00", Checkpoints.on_train_batch_start

    def late(self, trainer, *rest):
        if trainer.global_step == 5:
            (timer,) = (each for each in trainer.callbacks if isinstance(each, Timer))
            timer._offset += 3600
            os.kill(os.getpid(), signal.SIGTERM)
        begin(self, trainer, *rest)

    project = copy_of(fresh, tmp_path / "stopped")
    prepare = partial(setattr, Checkpoints, "on_train_batch_start", late)
    assert end(start(project, hour, prepare=prepare)) == 128 + signal.SIGTERM
    assert end(start(project, hour)) == 0, (project / "train.log").read_text()
    assert "Training took 5 steps of" in (project / "models/gpt2/README.md").read_text()
    nothing = copy_of(fresh, tmp_path / "nothing")
    assert end(start(nothing, "--trainer.max_time=00:00:00:00")) == 1
    assert (nothing / "train.log").read_text().endswith("max_time: it is over before the first step: raise it\n")


@pytest.mark.parametrize(
    "stage, key", [("train_tokenizer", "tokenizer.tokenizer_model"), ("train", "model.from_pretrained")]
)
def test_a_folder_that_changes_meanwhile(built, fresh, tmp_path, monkeypatch, stage, key):
    project, folder = copy_of(fresh, tmp_path / "project"), tmp_path / "project/other"
    shutil.copytree(built / "models/gpt2", folder)
    shutil.copytree(built / "data/corpus", project / "data/corpus")
    before = digests(project, "models/tokenizer")

    def read(function):
        def changed(*arguments):
            (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
            return function(*arguments)

        return changed

    monkeypatch.setattr(train_tokenizer, "existing", read(train_tokenizer.existing))
    monkeypatch.setattr(train, "fit", read(train.fit))
    status, _, err = run_stage(project, stage, f"--{key}={folder}", "--model.block_size=16", "--trainer.max_steps=2")
    assert (status, err.splitlines()[-1]) == (1, f"error: {key}: {folder} changed while it was used: run it again")
    assert digests(project, "models/tokenizer") == before and not (project / "models/gpt2").exists()


def holds(fresh: Path, tmp_path: Path, promise: str, every: list[str], *settings: str, second: int = 10) -> None:
    """Tries what the table says of some settings."""
    whole = copy_of(fresh, tmp_path / "whole")
    status = forked(whole, *settings)
    log = (whole / "train.log").read_text()
    if promise == "refused":
        assert status == 1 and re.search(r"^error: [^\n]+\Z", log.strip(), re.M), log
        assert not (whole / "models/gpt2").exists()
        return
    assert status == 0, log
    if promise == "not exact":
        return
    stopped = copy_of(fresh, tmp_path / "stopped")
    assert forked(stopped, *settings, *every, kill=(signal.SIGTERM, 5)) == 128 + signal.SIGTERM
    assert forked(stopped, *settings, *every, kill=(signal.SIGKILL, second)) == -signal.SIGKILL
    assert list(stopped.glob("models/checkpoints/*/step-*.ckpt"))
    assert forked(stopped, *settings, *every) == 0, (stopped / "train.log").read_text()
    assert "going on from" in (stopped / "train.log").read_text()
    assert made(stopped) == made(whole)
    assert {name.split("/")[-1] for name in made(whole)} >= {"model.safetensors", "README.md", "train.csv"}
