"""Perplexity against an independent computation: float64, one window at a time, from text and the saved model."""

import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import run, run_stage, set_params
from transformers import AutoModelForCausalLM, AutoTokenizer


def independent_figures(folder, text: str, stride: int) -> dict:
    """The definitions of the README, written as plainly as can be."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    documents = [d for d in re.split(r"\n(?:[ \t\r]*\n)+", text.strip("\n")) if d.strip()]
    stream = [tokenizer.eos_token_id]
    for document in documents:
        stream += tokenizer(document)["input_ids"] + [tokenizer.eos_token_id]
    T, total, scored, start = model.config.n_positions, 0.0, 1, 0
    while scored < len(stream):
        window = stream[start : start + T + 1]
        with torch.no_grad():
            logits = model(torch.tensor([window[:-1]])).logits[0]
        log_probabilities = torch.log_softmax(logits, -1)
        for i in range(scored - start - 1, len(window) - 1):
            total -= log_probabilities[i, window[i + 1]].item()
        scored = start + len(window)
        start += stride
    size = sum(len(d.encode()) for d in documents)
    return {
        "loss": total / (len(stream) - 1),
        "ppl": math.exp(total / (len(stream) - 1)),
        "bits_per_byte": total / math.log(2) / size,
        "word_ppl": math.exp(total / sum(len(d.split()) for d in documents)),
        "tokens": len(stream) - 1,
        "bytes": size,
    }


@pytest.mark.parametrize("stride", [16, 5, 1])
def test_figures_equal_an_independent_computation(project, stride):
    set_params(project, f"evaluate.stride={stride}")
    run("python", "-m", "stages.evaluate", cwd=project)
    figures = json.loads((project / "metrics/eval.json").read_text())
    for split in ("valid", "test"):
        expected = independent_figures(project / "models/gpt2", (project / f"data/{split}.txt").read_text(), stride)
        measured = {key: figures[split][key] for key in expected}
        assert measured == pytest.approx(expected, rel=1e-5)


def test_last_block_of_one_token(project):
    """A stream of k * T + 2 tokens ends in a block with one input and one target."""
    tokenizer = AutoTokenizer.from_pretrained(project / "models/tokenizer")
    words = (project / "data/test.txt").read_text().replace("\n", " ").split()
    for end in range(60, 400):
        text = " ".join(words[:end])
        tokens = len(tokenizer(text)["input_ids"]) + 2
        if tokens % 16 == 2:
            break
    assert (tokens - 1) % 16 == 1
    (project / "data/test.txt").write_text(text)
    run("dvc", "repro", "tokenize_blocks", cwd=project)
    run("python", "-m", "stages.evaluate", cwd=project)
    measured = json.loads((project / "metrics/eval.json").read_text())["test"]
    expected = independent_figures(project / "models/gpt2", text, 16)
    assert expected["tokens"] == tokens - 1
    assert {key: measured[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_unigram_baseline(built):
    train, test = (np.load(built / f"data/blocks/{split}.npy").tolist() for split in ("train", "test"))
    vocabulary = json.loads((built / "data/blocks/meta.json").read_text())["vocab_size"]
    total = -sum(math.log((train.count(token) + 1) / (len(train) + vocabulary)) for token in test[1:])
    measured = json.loads((built / "metrics/eval.json").read_text())["test"]["unigram_ppl"]
    assert measured == pytest.approx(math.exp(total / (len(test) - 1)), rel=1e-9)


def test_loss_tables_add_up_to_the_loss(built):
    import pandas as pd

    figures = json.loads((built / "metrics/eval.json").read_text())["test"]
    documents = pd.read_csv(built / "metrics/loss_by_document.csv")
    assert documents.tokens.sum() == figures["tokens"]
    assert (documents.tokens * documents.loss).sum() == pytest.approx(figures["loss"] * figures["tokens"])
    assert documents.loss.is_monotonic_increasing
    positions = pd.read_csv(built / "metrics/loss_by_position.csv")
    assert list(positions.position) == list(range(1, 17))


def test_model_option_measures_a_folder_on_any_text(project, tmp_path):
    committed = (project / "metrics/eval.json").read_bytes()
    pipeline = json.loads(committed)["test"]
    printed = json.loads(run("python", "-m", "stages.evaluate", "--model", "models/gpt2", cwd=project).stdout)
    assert printed["test"] == {key: pipeline[key] for key in printed["test"]}
    (tmp_path / "other.txt").write_text("Zwölf Boxkämpfer\n\nüber den Sylter Deich\n" * 9)
    command = (
        "python",
        "-m",
        "stages.evaluate",
        "--model",
        "models/gpt2",
        "--data.test_file",
        str(tmp_path / "other.txt"),
    )
    other = json.loads(run(*command, cwd=project).stdout)["test"]
    expected = independent_figures(project / "models/gpt2", (tmp_path / "other.txt").read_text(), 16)
    assert other == pytest.approx(expected, rel=1e-5)
    assert (project / "metrics/eval.json").read_bytes() == committed


def test_a_model_is_measured_in_the_precision_of_its_training(project):
    """Valid loss of the training (in bf16) and of the evaluation are of the same computation."""
    set_params(project, "trainer.precision=bf16-mixed", "evaluate.accelerator=cpu")
    for stage in ("train", "evaluate"):
        assert run_stage(project, stage)[0] == 0
    assert json.loads((project / "models/gpt2/config.json").read_text())["precision"] == "bf16-mixed"
    assert json.loads((project / "metrics/run.json").read_text())["precision"] == "bf16-mixed"
    assert "precision: bf16-mixed" in (project / "models/gpt2/README.md").read_text()
    trained = min(float(row.split(",")[2]) for row in (project / "metrics/valid.csv").read_text().split()[1:])
    measured = json.loads((project / "metrics/eval.json").read_text())["valid"]["loss"]
    set_params(project, "evaluate.precision=32-true")
    assert run_stage(project, "evaluate")[0] == 0
    exact = json.loads((project / "metrics/eval.json").read_text())["valid"]["loss"]
    expected = independent_figures(project / "models/gpt2", (project / "data/valid.txt").read_text(), 16)["loss"]
    assert exact == pytest.approx(expected, rel=1e-5)
    assert measured != exact
    assert abs(measured - trained) < abs(measured - exact)
    assert abs(measured - exact) < 1e-3


def test_a_device_that_is_not_there(built):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    status, _, err = run_stage(built, "evaluate", "--evaluate.accelerator", "cuda")
    assert status == 1
    assert (
        err == "error: evaluate.accelerator: cuda: this machine has none that PyTorch can use: set it to auto or cpu\n"
    )


@pytest.mark.gpu
def test_figures_of_a_gpu_are_those_of_the_cpu(project):
    losses = {}
    for accelerator in ("cpu", "cuda"):
        for precision in ("32-true", "bf16-mixed"):
            arguments = ("--evaluate.accelerator", accelerator, "--evaluate.precision", precision)
            assert run_stage(project, "evaluate", *arguments)[0] == 0
            losses[accelerator, precision] = json.loads((project / "metrics/eval.json").read_text())["test"]["loss"]
    assert max(losses.values()) - min(losses.values()) < 1e-3, losses
