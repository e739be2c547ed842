"""A training that was stopped ends with the bytes of one that never was."""

import hashlib
import os
import shutil
import signal
from pathlib import Path

import pytest

from stages import train

OUTPUTS = ("models/gpt2", "metrics/train.csv", "metrics/valid.csv")


def digests(project: Path) -> dict[str, str]:
    """SHA-256 of every output file of the train stage that must not vary."""
    files = [file for output in OUTPUTS for file in sorted([project / output, *(project / output).rglob("*")])]
    return {
        str(file.relative_to(project)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file()
    }


def train_here(monkeypatch, project: Path, *arguments: str) -> int:
    """Runs the train stage in this process; returns its exit status."""
    monkeypatch.chdir(project)
    monkeypatch.setattr("sys.argv", ["train", *arguments])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        train.main()
        return 0
    except SystemExit as stop:
        return stop.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


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
    "accumulate": [*SHORT, "--trainer.accumulate_grad_batches", "3", "--trainer.val_check_interval", "1.0"],
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
            with pytest.MonkeyPatch.context() as patch:
                assert train_here(patch, project, *SETTINGS[name]) == 0
            results[name] = digests(project)
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
            status = train_here(patch, project, *SETTINGS[name])
        if status == 0:
            break
        assert status == 128 + signal.SIGTERM
        stops += 1
        assert stops < 60
    assert stops >= 4
    assert digests(project) == expected


@pytest.mark.parametrize("name", ["epochs", "steps", "early"])
def test_stopped_in_each_validation(project, uninterrupted, monkeypatch, name):
    expected, stops = uninterrupted(name), 0
    shutil.rmtree(project / "models/gpt2")
    while True:
        with monkeypatch.context() as patch:
            signal_when(patch, "on_validation_batch_end", lambda trainer, *_: True)
            if train_here(patch, project, *SETTINGS[name]) == 0:
                break
            stops += 1
            assert stops < 30
    assert stops >= 4
    assert digests(project) == expected
