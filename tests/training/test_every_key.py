"""Each key of params.yaml that the train stage reads, set to another value, acts as docs/settings.md says."""

import shutil
from pathlib import Path

from stages import train
from stages.training.checkpoints import AtomicCheckpointIO
from stages.training.module import LanguageModel
from stages.watch.progress import Live

import pytest
import pytorch_lightning as pl
import torch
import yaml
from conftest import ROOT, digests, run_stage, train_inputs

SHORT = [
    "--model.block_size=64",
    "--optimizer.batch_size=16",
    "--optimizer.num_warmup_steps=2",
    "--trainer.max_steps=8",
    "--runtime.enable_progress_bar=false",
]
# Another weight file.
WEIGHTS = {
    "model.block_size": "32",
    "model.n_layer": "1",
    "model.n_head": "4",
    "model.n_embd": "32",
    "model.dropout": "0.1",
    "optimizer.name": "muon",
    "optimizer.lr": "1e-3",
    "optimizer.batch_size": "8",
    "optimizer.weight_decay": "0.5",
    "optimizer.betas": "[0.8, 0.95]",
    "optimizer.schedule": "linear",
    "optimizer.num_warmup_steps": "4",
    "optimizer.num_training_steps": "20",
    "optimizer.min_lr_ratio": "0.5",
    "trainer.max_steps": "5",
    "trainer.precision": "bf16-mixed",
    "trainer.accumulate_grad_batches": "2",
    "trainer.gradient_clip_val": "0.05",
    "trainer.callbacks": "[{class_path: EMAWeightAveraging, init_args: {decay: 0.9}}]",
    "seed_everything": "2",
}
# Tried in another test, which compares more than weights.
ELSEWHERE = {
    "model.from_pretrained": "test_figures.py",
    "model.gradient_checkpointing": "../model/test_gpt2.py",
    "trainer.devices": "test_scale.py",
    "trainer.num_nodes": "test_scale.py",
    "trainer.strategy": "test_scale.py",
    "optimizer.decay_fraction": "test_longer.py",
    "runtime.keep_trunks": "test_longer.py",
    "runtime.tasks": "../text/test_engine.py",
    "runtime.executor": "../text/test_engine.py",
    "runtime.executor_options": "../text/test_engine.py",
}


@pytest.fixture(scope="module")
def files(built, tmp_path_factory) -> Path:
    """What the train stage reads."""
    return train_inputs(built, tmp_path_factory.mktemp("keys") / "project")


def made(project: Path, *arguments: str) -> tuple[dict[str, str], str]:
    """The weight file's digest and the history's, and what was printed."""
    shutil.rmtree(project / "models/checkpoints", ignore_errors=True)
    status, out, err = run_stage(project, "train", *SHORT, *arguments)
    assert status == 0, err
    return digests(project, "models/gpt2/model.safetensors", "metrics/train.csv", "metrics/valid.csv"), out


@pytest.fixture(scope="module")
def plain(files) -> dict[str, str]:
    return made(files)[0]


def test_every_key_is_tried():
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    groups = ("model", "optimizer", "trainer", "runtime")
    keys = {f"{group}.{key}" for group in groups for key in params[group]} | {"seed_everything"}
    others = {name.removeprefix("test_").replace("__", ".") for name in globals() if "__" in name[5:]}
    others |= {f"runtime.checkpoint_every_{unit}" for unit in ("n_steps", "n_minutes")}
    assert keys <= WEIGHTS.keys() | ELSEWHERE.keys() | others
    assert all((Path(__file__).parent / ELSEWHERE[key]).exists() for key in keys & ELSEWHERE.keys())


@pytest.mark.parametrize("key", WEIGHTS)
def test_other_weights(files, plain, key):
    changed, _ = made(files, f"--{key}={WEIGHTS[key]}")
    assert changed["models/gpt2/model.safetensors"] != plain["models/gpt2/model.safetensors"]


def test_trainer__max_epochs(files, plain):
    steps = [made(files, "--trainer.max_steps=-1", f"--trainer.max_epochs={epochs}")[0] for epochs in (1, 2)]
    assert len({digest["models/gpt2/model.safetensors"] for digest in (plain, *steps)}) == 3


def test_trainer__val_check_interval(files, plain):
    changed, _ = made(files, "--trainer.val_check_interval=3")
    assert changed["metrics/valid.csv"] != plain["metrics/valid.csv"]


def counted(monkeypatch, kind: type, name: str) -> list[tuple]:
    """The calls of a method, which still does its work."""
    calls, original = [], getattr(kind, name)

    def watched(*arguments, **options):
        calls.append(arguments)
        return original(*arguments, **options)

    monkeypatch.setattr(kind, name, watched)
    return calls


def test_model__compile(files, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    made(files)
    assert not compiled
    made(files, "--model.compile=true")
    assert len(compiled) == 1


def test_trainer__deterministic(files, monkeypatch):
    seen = []
    monkeypatch.setattr(
        train.History,
        "on_train_end",
        lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()),
        raising=False,
    )
    made(files, "--trainer.deterministic=false")
    made(files)
    assert seen == [False, True]


def test_trainer__accelerator(files):
    status, _, err = run_stage(files, "train", *SHORT, "--trainer.accelerator=tpu")
    assert status == 1 and err.startswith("error: trainer: ")


def test_runtime__num_workers(files, plain, monkeypatch):
    loaders = counted(monkeypatch, torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "__init__")
    assert made(files, "--runtime.num_workers=1")[0] == plain
    assert {arguments[1].num_workers for arguments in loaders} == {1}


def test_runtime__log_every_n_steps(files, plain, monkeypatch):
    points = counted(monkeypatch, Live, "record")
    assert made(files, "--runtime.log_every_n_steps=2")[0] == plain
    assert sum("lr" in arguments[2] for arguments in points) == 4


def test_runtime__enable_progress_bar(files, plain):
    digest, out = made(files, "--runtime.enable_progress_bar=true")
    assert digest == plain and "valid_ppl" in out
    assert "valid_ppl" not in made(files)[1]


@pytest.mark.parametrize("key, value", [("checkpoint_every_n_steps", "3"), ("checkpoint_every_n_minutes", "0.00001")])
def test_runtime__checkpoint_every(files, plain, monkeypatch, key, value):
    saved = counted(monkeypatch, AtomicCheckpointIO, "save_checkpoint")
    off = "--runtime.checkpoint_every_n_minutes=0"
    assert made(files, off)[0] == plain
    names = {Path(arguments[2]).name for arguments in saved}  # one may be made before the first validation
    saved.clear()
    assert made(files, off, f"--runtime.{key}={value}")[0] == plain
    more = {Path(arguments[2]).name for arguments in saved} - names
    steps = (3, 6) if key == "checkpoint_every_n_steps" else range(1, 8)
    assert more == {f"step-{step:09d}.ckpt" for step in steps} - names


def test_runtime__profiler(files, plain, monkeypatch):
    chosen = counted(monkeypatch, pl.profilers.SimpleProfiler, "summary")
    assert made(files, "--runtime.profiler=simple")[0] == plain
    assert chosen


def test_runtime__num_sanity_val_steps(files, plain, monkeypatch):
    steps = counted(monkeypatch, LanguageModel, "validation_step")
    made(files)
    without = len(steps)
    assert made(files, "--runtime.num_sanity_val_steps=2")[0] == plain
    assert len(steps) == 2 * without + 2
