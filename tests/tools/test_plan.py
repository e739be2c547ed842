"""The plan against what the training then did."""

import re
import shutil
from types import SimpleNamespace

from tools import plan

import pandas as pd
import pytest
from conftest import digests, run_stage


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_plan_is_what_happens(built, optimizer):
    before = digests(built, "data", "models", "metrics", "logs")
    status, out, err = run_stage(built, "tools.plan", "--optimizer.name", optimizer, "--model.n_embd", "64")
    assert (status, digests(built, "data", "models", "metrics", "logs")) == (0, before), err
    valid = pd.read_csv(built / "metrics/valid.csv")
    assert f" {valid.step.iloc[-1]:,} steps of {4 * 16}, " in out
    assert f"{valid.step.iloc[-1]:,} steps of " in out.splitlines()[1]
    assert f", {len(valid)} validations of " in out
    layers, hidden, others = 2, 12 * 64 * 64, 13 * 64
    parameters = (300 + 16) * 64 + layers * (hidden + others) + 2 * 64
    assert f"GPT-2 with {parameters:,} parameters" in out
    # AdamW keeps two averages of each weight; Muon one of those it takes.
    kept = 2 * parameters - (layers * hidden if optimizer == "muon" else 0)
    assert f"optimizer {4 * kept / 2**20:.0f} MiB" in out
    peak, rest = re.search(r"^memory +([\d,]+) MiB: (.*)$", out, re.M).groups()
    assert int(peak.replace(",", "")) == pytest.approx(
        sum(int(part.replace(",", "")) for part in re.findall(r"([\d,]+) MiB", rest)), abs=3
    )
    assert re.search(r"^disk +blocks \d+ MiB", out, re.M)


def test_kept_trunks_take_disk(built):
    """A checkpoint of AdamW is the weights, the best of them, and two averages: four times the model."""
    wide = ("--model.n_embd", "256", "--optimizer.schedule", "wsd", "--runtime.keep_trunks", "3")
    status, out, err = run_stage(built, "tools.plan", *wide)
    assert status == 0, err
    parameters = int(re.search(r"with ([\d,]+) parameters", out)[1].replace(",", ""))
    during, after = map(int, re.search(r"checkpoints (\d+) MiB .* up to (\d+) MiB after", out).groups())
    assert after == pytest.approx(3 * 16 * parameters / 2**20, abs=1)
    assert during == pytest.approx((plan.KEPT + 1 + 3) * 16 * parameters / 2**20, abs=1)


def test_a_training_shorter_than_the_trial(built):
    status, out, err = run_stage(built, "tools.plan", "--trainer.max_epochs", "null", "--trainer.max_steps", "1")
    assert status == 0, err
    assert re.search(r"^minutes +0\.\d+: 1 steps of ", out, re.M)


@pytest.mark.parametrize("limit, seconds", [(None, 20.0), (0.5, 10.0), (8, 4.0), (100, 20.0)])
def test_validations_are_of_as_much_text_as_they_will_be(limit, seconds):
    """A trial's takes 2 seconds for 4 batches of 40."""
    trial = SimpleNamespace(planned=100, validation=2.0, limit=limit)
    blocks = SimpleNamespace(all_valid_batches=40)
    trainer = SimpleNamespace(accumulate_grad_batches=1, check_val_every_n_epoch=1, val_check_batch=10)
    vars(trainer).update(num_val_batches=[4], world_size=1, datamodule=blocks)
    assert plan.validating(trial, trainer) == (10, seconds)


def test_no_validations(built):
    status, out, err = run_stage(built, "tools.plan", "--trainer.limit_val_batches", "0")
    assert status == 0 and re.search(r", 0 validations of 0 s$", out, re.M), err


def test_a_training_without_an_end(built):
    endless = ("--trainer.max_epochs", "-1", "--trainer.max_time", "00:01:00:00", "--optimizer.schedule", "constant")
    status, out, err = run_stage(built, "tools.plan", *endless)
    assert status == 0 and re.search(r"^minutes +no end but trainer.max_time or a callback's: steps of ", out, re.M), (
        err
    )


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiling_is_tried_where_it_may_pay(built, monkeypatch):
    tried, takes, compiled = plan.tried, {False: 51.0, True: 48.0}, []

    def recorded(settings, *rest):
        trial, trainer = tried(settings, *rest)
        compiled.append(settings.model.compile)
        trial.compiled = settings.model.compile
        return trial, trainer

    monkeypatch.setattr(plan, "tried", recorded)
    monkeypatch.setattr(plan, "seconds", lambda trial, trainer: takes[trial.compiled])
    cases = [({}, [False, True], True), ({True: 52.0}, [False, True], False), ({False: 49.9}, [False], False)]
    for changes, tries, says in cases:
        compiled.clear()
        takes |= changes
        status, out, err = run_stage(built, "tools.plan")
        assert (status, compiled, "note: model.compile: true would take 0.80 minutes: " in err) == (0, tries, says), err
        assert re.search(r"^minutes +0\.8[35]: ", out, re.M)


@pytest.mark.parametrize(
    "changes, key",
    [
        ({}, None),
        ({"tokens": 500_000, "parameters": 124_000_000, "lr": 3e-3}, "model"),
        ({"vocab_size": 50257, "parameters": 7_200_000}, "tokenizer.vocab_size"),
        ({"documents": 100_000}, "model.block_size"),
        ({"lr": 3e-4}, "optimizer.lr"),
        ({"epochs": 45.0}, "trainer"),
        ({"epochs": 45.0, "dropout": 0.1}, None),
    ],
)
def test_odd_choices(changes, key):
    c = {"lr": 1e-2, "dropout": 0.0, "epochs": 2.1, "tokens": 900_000, "parameters": 1_300_000, "documents": 1000}
    c = SimpleNamespace(**{**c, "vocab_size": 4096, **changes})
    settings = SimpleNamespace(
        optimizer=SimpleNamespace(name="muon", lr=c.lr, batch_size=32),
        model=SimpleNamespace(block_size=128, dropout=c.dropout, from_pretrained=None),
        trainer=SimpleNamespace(accumulate_grad_batches=1),
    )
    config = SimpleNamespace(vocab_size=c.vocab_size, n_embd=128)
    train = SimpleNamespace(tokens=range(c.tokens), documents=c.documents)
    odd = [line.split(":")[0] for line in plan.odd_choices(settings, config, c.parameters, train, c.epochs)]
    assert odd == ([key] if key else [])


def test_usual_rates():
    """AdamW's is GPT-3's for GPT-2 small, Muon's near the default at its width."""
    assert plan.usual_lr("adamw", 768, 124_000_000) == pytest.approx(6e-4, rel=0.1)
    assert plan.usual_lr("muon", 128, 1_300_000) == pytest.approx(1e-2, rel=0.15)
