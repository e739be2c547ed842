"""A training that was stopped ends with the bytes of one that never was."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from stages import train
from stages.training import checkpoints

import faults
import pytest
from conftest import digests, run_stage


def made(project: Path) -> dict[str, str]:
    """SHA-256 of every output file of the train stage that must not vary."""
    files = digests(project, "models/gpt2", "metrics/train.csv", "metrics/valid.csv")
    assert {"models/gpt2/model.safetensors", "metrics/train.csv", "metrics/valid.csv"} <= files.keys()
    return files


def signal_when(monkeypatch, hook: str, due) -> None:
    """Sends this process SIGTERM in a hook of the History callback, once."""
    original = getattr(train.History, hook, None)
    sent = []

    def patched(self, trainer, *rest, **more):
        if original:
            original(self, trainer, *rest, **more)
        if not sent and due(trainer, *rest):
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.History, hook, patched, raising=False)


# Few enough blocks for epochs of a few steps, so that stops fall on every kind of place in them.
SHORT = ["--model.block_size", "64", "--optimizer.batch_size", "16", "--runtime.enable_progress_bar", "false"]
EARLY_STOPPING = (
    "[{class_path: EarlyStopping, init_args: {monitor: valid_loss, patience: 2, min_delta: 0.2}}, "
    "{class_path: ModelCheckpoint, init_args: {monitor: valid_loss, dirpath: logs/best}}]"
)
SETTINGS = {
    "epochs": [*SHORT],
    "steps": [*SHORT, "--trainer.max_epochs", "null", "--trainer.max_steps", "12", "--optimizer.schedule", "linear"],
    "accumulate": [*SHORT, "--trainer.precision", "bf16-mixed",
                "--trainer.accumulate_grad_batches", "3", "--trainer.val_check_interval", "1.0"],
    "dropout": [*SHORT, "--model.dropout", "0.2", "--optimizer.name", "muon",
                "--trainer.check_val_every_n_epoch", "null", "--trainer.val_check_interval", "5"],
    "early": [*SHORT, "--trainer.max_epochs", "5", f"--trainer.callbacks={EARLY_STOPPING}"],
}  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(built, tmp_path_factory):
    """The outputs of a whole run with given arguments."""
    results = {}

    def of(name: str) -> dict[str, str]:
        if name not in results:
            project = tmp_path_factory.mktemp("whole") / "project"
            shutil.copytree(built, project)
            assert run_stage(project, "train", *SETTINGS[name])[0] == 0
            results[name] = made(project)
        return results[name]

    return of


@pytest.mark.parametrize("name", SETTINGS)
def test_stopped_at_every_step(project, uninterrupted, monkeypatch, name):
    """SIGTERM after each optimizer step in turn: one run that is stopped dozens of times."""
    expected, stops = uninterrupted(name), 0
    shutil.rmtree(project / "models/gpt2")
    while True:
        with monkeypatch.context() as patch:
            seen = []

            def next_step(trainer, *_, seen=seen):
                seen.append(trainer.global_step)
                return seen[-1] > seen[0]

            signal_when(patch, "on_train_batch_end", next_step)
            patch.setattr(checkpoints, "LONG_VALIDATION_SECONDS", float("nan"))  # none is long
            status, *_ = run_stage(project, "train", *SETTINGS[name])
        if status == 0:
            break
        assert status == 128 + signal.SIGTERM
        stops += 1
        assert stops < 60
    assert stops >= 3
    assert made(project) == expected


@pytest.mark.parametrize("name", SETTINGS)
def test_stopped_in_each_validation(project, uninterrupted, monkeypatch, name):
    """SIGTERM in each validation in turn breaks it off; only the step before it is done again."""
    expected, stops, broken_off = uninterrupted(name), 0, []
    shutil.rmtree(project / "models/gpt2")
    while True:
        with monkeypatch.context() as patch:
            validated = []

            def second(trainer, *_, validated=validated):
                if trainer.fit_loop.epoch_loop.val_loop.batch_progress.current.ready == 1:
                    validated.append(trainer.global_step)
                return len(validated) == 2

            signal_when(patch, "on_validation_batch_start", second)
            # All but the first are too short otherwise.
            patch.setattr(checkpoints, "LONG_VALIDATION_SECONDS", 0)
            if run_stage(project, "train", *SETTINGS[name])[0] == 0:
                break
        stops += 1
        assert stops < 60
        newest = int(faults.checkpoint_files(project)[-1].stem.removeprefix("step-"))
        broken_off.append(validated[-1] - newest)
    assert set(broken_off) == {1}, broken_off
    assert made(project) == expected


def stop_at(monkeypatch, project: Path, step: int, *arguments: str) -> tuple[str, str]:
    """Trains until SIGTERM after a step, with a checkpoint at every second one before; returns what it printed."""
    with monkeypatch.context() as patch:
        signal_when(patch, "on_train_batch_end", lambda trainer, *_: trainer.global_step == step)
        every = ("--runtime.checkpoint_every_n_steps", "2")
        status, out, err = run_stage(project, "train", *SETTINGS["epochs"], *every, *arguments)
    assert status == 128 + signal.SIGTERM, err
    return out, err


def start_training(project: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "stages.train", *SETTINGS["epochs"]],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("workers", ["1", "2"])
def test_workers_go_on_with_the_batches_that_follow(project, uninterrupted, monkeypatch, workers):
    """They fetch ahead, and yet a run that was stopped inside its first and its second epoch sees what one without
    workers saw."""
    for step in (3, 9):
        stop_at(monkeypatch, project, step, "--runtime.num_workers", workers)
    assert run_stage(project, "train", *SETTINGS["epochs"], "--runtime.num_workers", workers)[0] == 0
    assert made(project) == uninterrupted("epochs")


def test_damaged_checkpoints_are_passed_over(project, uninterrupted, monkeypatch):
    for kind in faults.DAMAGES:
        shutil.rmtree(project / "models/checkpoints", ignore_errors=True)
        stop_at(monkeypatch, project, 6)
        assert faults.damage_newest(project, kind)
        status, out, err = run_stage(project, "train", *SETTINGS["epochs"])
        assert status == 0 and "step-000000006.ckpt is passed over" in err, kind
        assert "going on from" in out and "step-000000004.ckpt" in out, kind
        assert not (project / "hostile").exists(), f"{kind}: it was run"
        assert made(project) == uninterrupted("epochs"), kind


def test_only_its_own_run_takes_a_checkpoint(project, monkeypatch):
    stop_at(monkeypatch, project, 4)
    first = next((project / "models/checkpoints").glob("*/"))
    out, _ = stop_at(monkeypatch, project, 3, "--optimizer.lr", "1e-3")
    assert "going on" not in out
    # Another run's file in its place is refused too.
    (second,) = set((project / "models/checkpoints").glob("*/")) - {first}
    shutil.copy(first / "step-000000004.ckpt", second)
    out, err = stop_at(monkeypatch, project, 5, "--optimizer.lr", "1e-3")
    assert "another run" in err and "step-000000003" in out
    # Runtime settings are no part of what a run is.
    out, _ = stop_at(monkeypatch, project, 5, "--runtime.num_workers", "1", "--runtime.log_every_n_steps", "3")
    assert f"{first.name}/step-000000004" in out

    _, listed, _ = run_stage(project, "tools.checkpoints")
    assert f"{first.name}: step 5" in listed and second.name in listed
    assert run_stage(project, "tools.checkpoints", "--clean")[0] == 0
    assert not list((project / "models/checkpoints").glob("*/"))


def test_full_disk(project, uninterrupted, monkeypatch):
    stop_at(monkeypatch, project, 4)
    before = faults.checkpoint_files(project)
    assert faults.train_on_a_full_disk(project, *SETTINGS["epochs"], "--runtime.checkpoint_every_n_steps", "1")
    assert faults.checkpoint_files(project) == before
    assert not list(project.glob("models/checkpoints/*/.*.tmp"))
    assert run_stage(project, "train", *SETTINGS["epochs"])[0] == 0
    assert made(project) == uninterrupted("epochs")


def test_loss_not_finite(project):
    arguments = ["--optimizer.lr=1e30", "--trainer.gradient_clip_val=null", "--runtime.checkpoint_every_n_steps=1"]
    for going_on in (False, True):  # the next run goes on from the last good checkpoint, to the same end
        status, out, err = run_stage(project, "train", *SETTINGS["epochs"], *arguments)
        assert status == 1 and "not a finite number at step 2: lower optimizer.lr" in err
        assert [file.name for file in faults.checkpoint_files(project)] == ["step-000000001.ckpt"]
        assert ("going on from" in out) == going_on


def test_killed_before_dvc_records_it(project, uninterrupted):
    """SIGKILL once training has ended: the next run has only to export."""
    shutil.rmtree(project / "models/gpt2")
    process = start_training(project)
    while not list(project.glob("models/checkpoints/*/final.ckpt")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    process.kill()
    process.communicate()
    status, out, _ = run_stage(project, "train", *SETTINGS["epochs"])
    assert status == 0 and "final.ckpt" in out
    assert made(project) == uninterrupted("epochs")


def test_two_trainings_at_once(project, uninterrupted):
    """The second waits for the first, and has then only to export; meanwhile nothing is cleaned."""
    shutil.rmtree(project / "models/gpt2")
    both = [start_training(project), start_training(project)]
    printed = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert "is training in this folder: waiting" in "".join(errors for _, errors in printed)
    assert made(project) == uninterrupted("epochs")


HOLD = "from stages.training.checkpoints import *; lock = training_lock(); print(flush=True); input()"


def test_clean_leaves_a_training_at_work(project):
    command = [sys.executable, "-c", HOLD]
    holder = subprocess.Popen(command, cwd=project, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    status, _, err = run_stage(project, "tools.checkpoints", "--clean")
    assert status == 1 and f"process {holder.pid} is training" in err
    holder.kill()
    holder.communicate()
    assert run_stage(project, "tools.checkpoints", "--clean")[0] == 0
