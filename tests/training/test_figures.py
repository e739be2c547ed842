"""Every figure of a training is of the weights that it exports, measured as it says; and every setting acts."""

import json
import re
import shutil
from pathlib import Path

from stages.model import gpt2
from stages.training.best import BestWeights

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import run, run_stage
from transformers import GPT2LMHeadModel

SHORT = ["--model.block_size=64", "--optimizer.batch_size=16", "--runtime.enable_progress_bar=false"]


@pytest.fixture
def files(built, tmp_path) -> Path:
    """What the train and evaluate stages read."""
    project = tmp_path / "project"
    for name in ("data/blocks", "models/tokenizer", "stages"):
        shutil.copytree(built / name, project / name)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(built / name, project)
    return project


def train(project: Path, *arguments: str) -> tuple[str, str]:
    status, out, err = run_stage(project, "train", *SHORT, *arguments)
    assert status == 0, err
    return out, err


def callback(name: str, **arguments) -> str:
    return "--trainer.callbacks=" + json.dumps([{"class_path": name, "init_args": arguments}])


def weights(project: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(project / "models/gpt2/model.safetensors")


def card(project: Path) -> str:
    return (project / "models/gpt2/README.md").read_text()


def loss_of(project: Path, block_size: int = 64, blocks: int | None = None) -> float:
    """Nats a token of the exported model on the validation text, by transformers' own forward pass."""
    model = GPT2LMHeadModel.from_pretrained(project / "models/gpt2").eval()
    tokens = torch.from_numpy(np.load(project / "data/blocks/valid.npy").astype(np.int64))
    total, count = 0.0, 0
    for i in range(0, len(tokens) - 1, block_size)[:blocks] if blocks else range(0, len(tokens) - 1, block_size):
        block = tokens[i : i + block_size + 1]
        with torch.no_grad():
            total += F.cross_entropy(model(block[None, :-1]).logits[0], block[1:], reduction="sum").item()
        count += len(block) - 1
    return total / count


@pytest.mark.parametrize(
    "settings",
    [
        [callback("EMAWeightAveraging", decay=0.9), "--trainer.val_check_interval=1.0"],
        [callback("WeightAveraging"), "--trainer.val_check_interval=4"],
        [callback("EMAWeightAveraging", decay=0.9), "--trainer.limit_val_batches=0"],
        ["--trainer.val_check_interval=4"],
    ],
    ids=["EMA", "average", "EMA without validation", "plain"],
)
def test_what_was_validated_is_exported(files, settings):
    train(files, *settings)
    if "limit_val_batches" not in settings[-1]:
        recorded = pd.read_csv(files / "metrics/valid.csv")["valid_loss"].min()
        assert loss_of(files) == pytest.approx(recorded, abs=1e-5)
    averaged = weights(files)
    if "callbacks" in settings[0]:
        train(files, *settings[1:])
        assert any(not torch.equal(averaged[name], weight) for name, weight in weights(files).items())


def test_the_card_says_how_much_was_scored(files):
    train(files, "--trainer.limit_val_batches=1")
    whole = len(np.load(files / "data/blocks/valid.npy")) - 1
    assert f"{16 * 64:,}" in card(files) and f"{whole:,}" in card(files)
    recorded = pd.read_csv(files / "metrics/valid.csv")["valid_loss"].min()
    assert loss_of(files, blocks=16) == pytest.approx(recorded, abs=1e-5)
    assert f"| {recorded:.4f} |" in card(files)
    train(files)
    assert f"{whole:,} predicted tokens" in card(files)


def pretrained(files: Path) -> Path:
    """A model of 128 positions to fine-tune."""
    train(files, "--model.block_size=128", "--optimizer.batch_size=8", "--trainer.max_steps=4")
    return shutil.move(files / "models/gpt2", files / "pretrained")


def test_one_context_length_in_fine_tuning(files):
    pretrained(files)
    fine = ["--model.from_pretrained=pretrained", "--trainer.max_steps=4"]
    train(files, *fine)
    recorded = pd.read_csv(files / "metrics/valid.csv")["valid_loss"].min()
    assert loss_of(files, block_size=64) == pytest.approx(recorded, abs=1e-5)
    status, _, err = run_stage(files, "evaluate", "--model.block_size=64", "--generate.prompts=[]")
    assert status == 0, err
    assert json.loads((files / "metrics/eval.json").read_text())["valid"]["loss"] == pytest.approx(recorded, abs=1e-5)
    status, _, err = run_stage(files, "evaluate", "--evaluate.stride=100", "--model.block_size=128")
    assert status == 1 and "stride" in err


def test_dropout_acts_in_fine_tuning(files):
    pretrained(files)
    made = []
    for rate in ("0.0", "0.5", "0.5"):
        train(files, "--model.from_pretrained=pretrained", "--trainer.max_steps=4", f"--model.dropout={rate}")
        made.append(weights(files))
    assert not torch.equal(made[0]["transformer.wte.weight"], made[1]["transformer.wte.weight"])
    assert torch.equal(made[1]["transformer.wte.weight"], made[2]["transformer.wte.weight"])


def test_output_embeddings_of_its_own_are_kept(files):
    folder = pretrained(files)
    model = GPT2LMHeadModel.from_pretrained(folder)
    config = model.config
    config.tie_word_embeddings = False
    untied = GPT2LMHeadModel(config)
    untied.transformer.load_state_dict(model.transformer.state_dict())
    torch.nn.init.normal_(untied.lm_head.weight, std=0.05)
    untied.save_pretrained(folder)
    before = untied.lm_head.weight.detach().clone()
    train(files, "--model.from_pretrained=pretrained", "--trainer.max_steps=4")
    after = weights(files)["lm_head.weight"]
    assert 0 < (after - before).abs().max() < 0.1
    recorded = pd.read_csv(files / "metrics/valid.csv")["valid_loss"].min()
    assert loss_of(files) == pytest.approx(recorded, abs=1e-5)


def test_an_export_of_other_weights_is_an_error(files, monkeypatch):
    train(files, "--trainer.max_steps=4")
    before = (files / "models/gpt2/model.safetensors").read_bytes()
    export = BestWeights.export

    def wrong(self, model, folder):
        self.weights["model.transformer.ln_f.bias"] = self.weights["model.transformer.ln_f.bias"] + 1
        export(self, model, folder)

    monkeypatch.setattr(BestWeights, "export", wrong)
    status, _, err = run_stage(files, "train", *SHORT, "--trainer.max_steps=4", "--seed_everything=7")
    assert status == 1 and re.search("^error: .*exported model's loss .* where training recorded", err, re.M), err
    assert (files / "models/gpt2/model.safetensors").read_bytes() == before


def test_overfit_batches_sees_the_same_ones(files, monkeypatch):
    seen, loss = [], gpt2.loss

    def watched(model, tokens):
        seen.append(tokens.clone())
        return loss(model, tokens)

    monkeypatch.setattr(gpt2, "loss", watched)
    train(files, "--trainer.overfit_batches=1", "--trainer.max_epochs=5")
    assert len(seen) == 5 and all(torch.equal(batch, seen[0]) for batch in seen)


def test_what_is_asked_for_is_shown(files):
    """In a process of its own: Lightning writes to the standard error that was there when it was imported."""
    asked = [
        {"class_path": "ModelSummary"},
        {"class_path": "EarlyStopping", "init_args": {"monitor": "valid_loss", "patience": 99, "verbose": True}},
    ]
    callbacks = ("--trainer.callbacks", json.dumps(asked))
    for profiler in ("simple", "advanced"):
        done = run("python", "-m", "stages.train", *SHORT, *callbacks, f"--runtime.profiler={profiler}", cwd=files)
        for shown in ("run_training_batch", "Modules in train mode", "Metric valid_loss improved"):
            assert shown in done.stdout + done.stderr, (profiler, shown)
        shutil.rmtree(files / "models/checkpoints")
