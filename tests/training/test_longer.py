"""A training made longer ends with the bytes of one trained from nothing to the new length."""

import re
import shutil
import signal
from pathlib import Path

import pytest
from conftest import run_stage
from forks import forked
from test_resume import made, signal_when

WSD = [
    *("--optimizer.schedule", "wsd", "--model.block_size", "64", "--optimizer.batch_size", "4"),
    *("--trainer.val_check_interval", "0.4", "--runtime.enable_progress_bar", "false"),
]
THREE_THEN_TWO = "{class_path: GradientAccumulationScheduler, init_args: {scheduling: {0: 3, 1: 2}}}"
EMA = "--trainer.callbacks={class_path: EMAWeightAveraging, init_args: {decay: 0.9}}"
MUON = ["--optimizer.name", "muon", "--model.dropout", "0.2", "--trainer.accumulate_grad_batches", "3", EMA]
LENGTHS = {"epochs": [*WSD, "--trainer.callbacks", THREE_THEN_TWO], "muon": [*WSD, *MUON]}


KILLED = [5, 21, 25, 33, 27]  # steps, in trunks and in cooldowns


def trunks(project: Path) -> list[int]:
    return sorted(int(path.stem.split("-")[1]) for path in project.glob("models/checkpoints/*/trunk-*.ckpt"))


def train_in_pieces(monkeypatch, project: Path, every: int, *arguments: str) -> tuple[int, str]:
    """Trains to the end, stopped by SIGTERM after each `every` steps; returns how often, and what was printed."""
    stops, printed = 0, ""
    while True:
        with monkeypatch.context() as patch:
            seen = []

            def due(trainer, *_, seen=seen):
                seen.append(trainer.global_step)
                return seen[-1] >= seen[0] + every

            signal_when(patch, "on_train_batch_end", due)
            status, out, err = run_stage(project, "train", *arguments)
        printed += out
        if status == 0:
            return stops, printed
        assert status == 128 + signal.SIGTERM, err
        stops += 1


def test_a_shorter_training_leaves_a_longer_ones_checkpoints(built, tmp_path):
    """Of the longer one, those after the shorter one's cooldown began; and the shorter one goes on from its own."""
    project = shutil.copytree(built, tmp_path / "project")
    every = [*WSD, "--optimizer.decay_fraction", "0.5", "--runtime.checkpoint_every_n_steps", "4"]
    long, short = ([*every, "--trainer.max_epochs", "null", "--trainer.max_steps", steps] for steps in ("60", "24"))
    log = project / "train.log"
    assert forked(project, *long, kill=(signal.SIGTERM, 22)) == 128 + signal.SIGTERM
    assert forked(project, *short, kill=(signal.SIGTERM, 9)) == 128 + signal.SIGTERM
    log.write_text("")
    assert forked(project, *short) == 0
    assert re.search(r"going on from .*step-000000009\.ckpt", log.read_text()), log.read_text()
    log.write_text("")
    assert forked(project, *long) == 0
    assert re.search(r"going on from .*step-000000022\.ckpt", log.read_text()), log.read_text()


@pytest.mark.parametrize("name", LENGTHS)
def test_longer_trainings(built, tmp_path, monkeypatch, name):
    """1, 2 and 3 epochs, then fewer steps, then another cooldown: each as if it had been trained from nothing."""
    project = shutil.copytree(built, tmp_path / "project")
    shutil.rmtree(project / "models/gpt2")
    lengths = [
        ("--trainer.max_epochs", "1"),
        ("--trainer.max_epochs", "2"),
        ("--trainer.max_epochs", "3"),
        ("--trainer.max_epochs", "3", "--optimizer.decay_fraction", "0.15", "--optimizer.min_lr_ratio", "0.1"),
        ("--trainer.max_epochs", "null", "--trainer.max_steps", "31"),
    ]
    for i, length in enumerate(lengths):
        arguments = [*LENGTHS[name], *length]
        if killed := name == "muon":
            every = ("--runtime.checkpoint_every_n_steps", "2")
            assert forked(project, *arguments, *every, kill=(signal.SIGKILL, KILLED[i])) == -signal.SIGKILL
        stops, printed = train_in_pieces(monkeypatch, project, 1000 if i % 2 else 4, *arguments)
        printed += (project / "train.log").read_text() if killed else ""
        assert i % 2 or stops > 0
        if 0 < i < 4:
            assert "of the trunk: " in printed, length
        whole = shutil.copytree(built, tmp_path / f"whole-{i}")
        status, out, _ = run_stage(whole, "train", *arguments)
        assert status == 0 and "going on" not in out
        assert made(project) == made(whole), length
        shutil.rmtree(whole)
    assert len(trunks(project)) == 2
