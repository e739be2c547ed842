"""What a training does against its definition, written out: Muon, betas, clipping, history, checkpoints, identity."""

import json
import math
import os
import re
import shutil
import signal
from types import SimpleNamespace

from stages.common.params import load
from stages.model import gpt2, optimizers
from stages.training import checkpoints, history, identity, module

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import transformers
from conftest import run_stage
from muon import orthogonal
from test_training import SHORT, expected_rate, files, train  # noqa: F401
from transformers import GPT2Config, GPT2LMHeadModel


def plain_loop(seen, rates, muon=False, betas=(0.9, 0.95), decay=0.0, accumulate=1, clip=None) -> tuple[dict, list]:
    """The last weights and each step's mean loss of a training in float64 with transformers' own model.

    Args:
        muon: whether matrices inside the layers are Muon's (neurons of NorMuon, step size of Liu et al., 2025); the
            rest is AdamW's.
        clip: the largest absolute value of a gradient's element.
    """
    vocabulary, width = seen.first["transformer.wte.weight"].shape
    config = GPT2Config(vocab_size=vocabulary, n_positions=16, n_layer=2, n_head=2, n_embd=width,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.load_state_dict(seen.first)
    model.double()
    first, second, losses = {}, {}, []
    for t, rate in enumerate(rates, 1):
        parts = seen.batches[(t - 1) * accumulate : t * accumulate]
        total = 0.0
        for batch in parts:
            scores = model(batch[:, :-1]).logits
            loss = F.cross_entropy(scores.reshape(-1, vocabulary), batch[:, 1:].reshape(-1)) / accumulate
            loss.backward()
            total += loss.item()
        losses.append(total)
        with torch.no_grad():
            for name, p in model.named_parameters():
                grad = p.grad if clip is None else p.grad.clamp(-clip, clip)
                if not re.search(r"bias|ln_", name):
                    p *= 1 - rate * decay
                if muon and p.ndim == 2 and ".h." in name:
                    first[name] = betas[0] * first.get(name, 0) + (1 - betas[0]) * grad
                    update = orthogonal(betas[0] * first[name] + (1 - betas[0]) * grad)
                    squares = (update**2).mean(0 if p.shape[0] <= p.shape[1] else 1, keepdim=True)
                    second[name] = betas[1] * second.get(name, 0) + (1 - betas[1]) * squares
                    even = update / second[name].sqrt()
                    p -= rate * 0.2 * math.sqrt(max(p.shape)) * even * update.norm() / even.norm()
                else:
                    first[name] = betas[0] * first.get(name, 0) + (1 - betas[0]) * grad
                    second[name] = betas[1] * second.get(name, 0) + (1 - betas[1]) * grad.square()
                    root = (second[name] / (1 - betas[1] ** t)).sqrt() + 1e-8
                    p -= rate * (first[name] / (1 - betas[0] ** t)) / root
                p.grad = None
    return model.state_dict(), losses


@pytest.mark.parametrize(
    "settings, definition",
    [
        (
            ["--optimizer.name", "muon", "--optimizer.weight_decay", "0.5", "--optimizer.betas", "[0.8, 0.9]"],
            {"muon": True, "decay": 0.5, "betas": (0.8, 0.9)},
        ),
        (["--optimizer.betas", "[0.7, 0.8]", "--optimizer.weight_decay", "0.0"], {"betas": (0.7, 0.8)}),
        (
            ["--trainer.gradient_clip_val", "0.002", "--trainer.gradient_clip_algorithm", "value",
             "--trainer.accumulate_grad_batches", "3", "--optimizer.weight_decay", "0.0"],
            {"clip": 0.002, "accumulate": 3},
        ),
    ],
    ids=["muon", "betas", "clip by value and accumulate"],
)  # fmt: skip
def test_training_is_its_definition(files, monkeypatch, settings, definition):  # noqa: F811
    monkeypatch.setattr(optimizers, "multiplies_bf16", lambda device: False)
    if "clip" not in definition:
        settings = [*settings, "--trainer.gradient_clip_val", "null"]
    accumulate = definition.get("accumulate", 1)
    seen = train(
        files,
        *("--optimizer.schedule", "cosine", "--optimizer.num_warmup_steps", "2", "--optimizer.min_lr_ratio", "0.2"),
        *("--trainer.precision", "32-true", "--trainer.limit_train_batches", "12", *settings),
    )
    steps = 12 // accumulate
    rates = [expected_rate(step, steps, "cosine", 2, 4e-3, 0.2) for step in range(1, steps + 1)]
    last, losses = plain_loop(seen, rates, **definition)
    for name, weight in seen.last.items():
        moved = (last[name] - seen.first[name]).norm()
        assert (weight - last[name]).norm() < 0.02 * moved, name
    # The history's loss is the mean over all that a step saw.
    assert list(pd.read_csv(files / "metrics/train.csv").train_loss) == pytest.approx(losses, rel=1e-3)
    card = (files / "models/gpt2/README.md").read_text()
    assert f"{24 * 16 * accumulate:,} tokens" in card
    valid = pd.read_csv(files / "metrics/valid.csv")
    assert f"weights of step {valid.step[valid.valid_loss.argmin()]:,}," in card


def test_dropout_differs_at_each_step():
    """The same weights and batch: another loss at another step, and the same one when it is done again."""
    shape = SimpleNamespace(block_size=16, n_layer=2, n_head=2, n_embd=16, dropout=0.5)
    model = gpt2.new_model(shape, 50, 0).train()

    def at(step: int) -> float:
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=step))
        trainer = SimpleNamespace(fit_loop=loop, world_size=1)
        settings = SimpleNamespace(model=shape, seed_everything=1)
        me = SimpleNamespace(trainer=trainer, settings=settings, model=model, loss=gpt2.loss,
                             global_rank=0, loss_is_monitored=False)  # fmt: skip
        return module.LanguageModel.training_step(me, torch.arange(34).view(2, 17), 0).item()

    assert at(1) != at(2) and at(1) == at(1)


def test_compile_compiles(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: ("compiled", function))
    for on in (True, False):
        me = module.LanguageModel(
            torch.nn.Linear(1, 1), SimpleNamespace(model=SimpleNamespace(compile=on, gradient_checkpointing=False))
        )
        assert me.loss == (("compiled", gpt2.loss) if on else gpt2.loss)


def test_checkpoints_by_the_clock(files, monkeypatch):  # noqa: F811
    """A step of this clock takes 25 seconds: with one minute between them, every third step makes a checkpoint."""
    clock, saved, validated = [0.0], [], []
    save, end = checkpoints.Checkpoints.save, history.History.on_train_batch_end

    def tick(self, *rest):
        clock[0] += 25
        end(self, *rest)

    validate = module.LanguageModel.validation_step

    def tick_too(self, *rest):
        clock[0] += 1
        validated.append(self)
        return validate(self, *rest)

    monkeypatch.setattr(history.History, "on_train_batch_end", tick)
    monkeypatch.setattr(module.LanguageModel, "validation_step", tick_too)
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(checkpoints, "LONG_VALIDATION_SECONDS", float("nan"))
    monkeypatch.setattr(
        checkpoints.Checkpoints, "save", lambda self, trainer: (saved.append(trainer.global_step), save(self, trainer))
    )
    for minutes, expected in ((1, [3, 6, 9]), (0, [])):
        saved.clear(), validated.clear()
        status, _, err = run_stage(
            files, "train", *SHORT, "--trainer.limit_train_batches", "11", "--seed_everything", str(minutes),
            *("--runtime.checkpoint_every_n_minutes", str(minutes), "--runtime.checkpoint_every_n_steps", "0"),
        )  # fmt: skip
        assert status == 0, err
        assert saved == expected
        figures = json.loads((files / "metrics/run.json").read_text())
        assert validated and figures["train_seconds"] == 11 * 25 + len(validated)
        assert figures["tokens_per_second"] == round(11 * 24 * 16 / (11 * 25))


def test_points_of_the_history_become_fewer(files, monkeypatch):  # noqa: F811
    """Of 20 steps, when there may be 8 points: each of the first 16 is in a mean of four, and so are the last four."""
    few = ("--trainer.limit_train_batches", "20", "--trainer.val_check_interval", "1.0", "--model.block_size", "8")
    tables = {}
    for points in (200, 8):
        monkeypatch.setattr(history, "HISTORY_POINTS", points)
        shutil.rmtree(files / "models/checkpoints", ignore_errors=True)  # or it would go on from its end
        status, _, err = run_stage(files, "train", *SHORT, *few)
        assert status == 0, err
        tables[points] = pd.read_csv(files / "metrics/train.csv")
    status, _, err = run_stage(files, "train", *SHORT, *few, "--trainer.limit_train_batches", "22")
    assert json.loads((files / "metrics/run.json").read_text())["tokens"] == 22 * 24 * 8  # the last point is at 20
    every, points = tables[200], tables[8]
    assert every.step.tolist() == list(range(1, 21)) and points.step.tolist() == [4, 8, 12, 16, 20]
    assert points.train_loss.tolist() == pytest.approx(every.train_loss.to_numpy().reshape(5, 4).mean(1).tolist())
    last = ["step", "tokens", "lr", "grad_norm"]
    assert points[last].equals(every[last][3::4].reset_index(drop=True))


def test_sigusr1_stops_and_goes_on(files, monkeypatch):  # noqa: F811
    """SLURM's warning before it kills; on another number of threads the run says what that means."""
    end = history.History.on_train_batch_end

    def warned(self, trainer, *rest):
        end(self, trainer, *rest)
        if trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGUSR1)

    with monkeypatch.context() as patch:
        patch.setattr(history.History, "on_train_batch_end", warned)
        status, _, err = run_stage(files, "train", *SHORT)
    assert status == 128 + signal.SIGUSR1 and "stopped by SIGUSR1 at step 4" in err
    threads = torch.get_num_threads()
    # Not set_num_threads: what is forked from this process later would sometimes have no thread pool.
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    status, out, err = run_stage(files, "train", *SHORT)
    assert status == 0 and "step-000000004.ckpt" in out, err
    assert f"note: the checkpoint was made with threads {threads}, now {threads + 1}: the result may differ" in err


def test_what_a_run_is(built, tmp_path, monkeypatch):
    """Data, versions, settings and pretrained weights are part of it; how many devices share the work is not."""
    monkeypatch.chdir(built)

    def of(*arguments: str, train="a", valid="b", tokenizer="c", trunk=False) -> str:
        splits = (SimpleNamespace(sha256=sha256, tokenizer=tokenizer) for sha256 in (train, valid))
        return identity.run_identity(load("stages.train", "", argv=list(arguments)), *splits)[trunk]

    plain = of()
    assert of() == plain == of("--trainer.devices", "2", "--runtime.num_workers", "1")
    for other in ({"train": "x"}, {"valid": "x"}, {"tokenizer": "x"}):
        assert of(**other) != plain
    for setting in (("model.dropout", "0.3"), ("optimizer.lr", "1e-3"), ("optimizer.betas", "[0.8, 0.9]"),
                    ("trainer.max_epochs", "3"), ("seed_everything", "5")):  # fmt: skip
        assert of(f"--{setting[0]}", setting[1]) != plain
        shared = of(f"--{setting[0]}", setting[1], trunk=True) == of(trunk=True)
        assert shared == (setting[0] == "trainer.max_epochs")
    for library in (torch, pl, np, transformers):
        with monkeypatch.context() as patch:
            patch.setattr(library, "__version__", "0.0.0")
            assert of() != plain, library
    weights = tmp_path / "pretrained/model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"one")
    one = of("--model.from_pretrained", str(weights.parent))
    weights.write_bytes(b"two")
    two = of("--model.from_pretrained", str(weights.parent))
    (weights.parent / "config.json").write_text("{}")
    assert len({one, two, of("--model.from_pretrained", str(weights.parent))}) == 3


def test_a_checkpoint_of_another_tokenizer_is_not_measured(built, tmp_path):
    model = GPT2LMHeadModel.from_pretrained(built / "models/gpt2")
    meta = json.loads((built / "data/blocks/meta.json").read_text())
    checkpoint = {"gpt2_config": model.config.to_dict(), "state_dict": model.state_dict()}
    torch.save(checkpoint | {"tokenizer": "another"}, tmp_path / "other.ckpt")
    status, out, err = run_stage(built, "evaluate", "--model", str(tmp_path / "other.ckpt"))
    assert status == 1 and "was trained with another tokenizer" in err and not out
    torch.save(checkpoint | {"tokenizer": meta["tokenizer"]}, tmp_path / "same.ckpt")
    status, out, err = run_stage(built, "evaluate", "--model", str(tmp_path / "same.ckpt"))
    assert status == 0, err
    expected = json.loads((built / "metrics/eval.json").read_text())["test"]["loss"]
    assert json.loads(out)["test"]["loss"] == pytest.approx(expected, rel=1e-6)
