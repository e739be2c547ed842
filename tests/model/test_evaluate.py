"""Perplexity against an independent computation: float64, one window at a time, from text and the saved model."""

import json
import math
import re
import shutil
from types import SimpleNamespace

from stages.model import scoring
from stages.model.gpt2 import load_model
from stages.text.streams import load_split, write_blocks

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from conftest import corpus_of, run_stage, set_params
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


def all_figures(project) -> dict:
    """What eval.json and details.json say of each set."""
    figures, details = (json.loads((project / f"metrics/{name}.json").read_text()) for name in ("eval", "details"))
    assert list(figures) == list(details) == ["test", "valid"]
    assert all(list(row) == ["ppl", "bits_per_byte", "loss"] for row in figures.values())
    return {name: figures[name] | details[name] for name in figures}


@pytest.mark.parametrize("stride", [16, 5, 1])
def test_figures_equal_an_independent_computation(project, stride):
    set_params(project, f"evaluate.stride={stride}")
    assert run_stage(project, "evaluate")[0] == 0
    figures = all_figures(project)
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
    for stage in ("prepare_corpus", "tokenize_blocks", "evaluate"):
        assert run_stage(project, stage)[0] == 0
    measured = all_figures(project)["test"]
    expected = independent_figures(project / "models/gpt2", text, 16)
    assert expected["tokens"] == tokens - 1
    assert {key: measured[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_unigram_baseline(built):
    train, test = (np.load(built / f"data/blocks/{split}.npy").tolist() for split in ("train", "test"))
    vocabulary = json.loads((built / "data/blocks/meta.json").read_text())["vocab_size"]
    total = -sum(math.log((train.count(token) + 1) / (len(train) + vocabulary)) for token in test[1:])
    measured = all_figures(built)["test"]["unigram_ppl"]
    assert measured == pytest.approx(math.exp(total / (len(test) - 1)), rel=1e-9)


def test_documents_are_those_of_the_text_and_add_up_to_the_figures(built):
    documents = pd.read_csv(built / "metrics/documents.csv")
    assert list(documents) == ["set", "document", "tokens", "bytes", "words", "nll"]
    assert list(documents.set.unique()) == ["test", "valid"]
    for name, figures in all_figures(built).items():
        rows = documents[documents.set == name]
        texts = re.split(r"\n\n", (built / f"data/{name}.txt").read_text().strip("\n"))
        assert list(rows.document) == list(range(1, len(texts) + 1))
        assert list(rows.bytes) == [len(text.encode()) for text in texts]
        assert list(rows.words) == [len(text.split()) for text in texts]
        assert rows.tokens.sum() == figures["tokens"]
        assert rows.nll.sum() / rows.tokens.sum() == pytest.approx(figures["loss"])
        assert rows.nll.sum() / math.log(2) / rows.bytes.sum() == pytest.approx(figures["bits_per_byte"])
    positions = pd.read_csv(built / "metrics/loss_by_position.csv")
    assert list(positions.position) == list(range(1, 17))


def test_nll_of_a_document_is_its_own(built):
    """Each document's tokens and its end-of-text, scored one window at a time."""
    tokens = np.load(built / "data/blocks/valid.npy").astype(int)
    model = AutoModelForCausalLM.from_pretrained(built / "models/gpt2").double().eval()
    T, documents, nll = model.config.n_positions, [], []
    for start in range(0, len(tokens) - 1, T):
        window = torch.tensor(tokens[start : start + T + 1])
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(model(window[None, :-1]).logits[0], window[1:], reduction="none")
        for token, loss in zip(window[1:].tolist(), losses.tolist()):
            nll.append(loss)
            if token == tokens[0]:
                documents.append(sum(nll))
                nll = []
    rows = pd.read_csv(built / "metrics/documents.csv").query("set == 'valid'")
    assert list(rows.nll) == pytest.approx(documents, rel=1e-5)


def test_interval_of_ppl_is_that_of_resampled_documents(built):
    rows = pd.read_csv(built / "metrics/documents.csv").query("set == 'valid'").reset_index()
    random = np.random.default_rng(1)
    ppls = []
    for _ in range(4000):
        drawn = rows.iloc[random.integers(len(rows), size=len(rows))]
        ppls.append(math.exp(drawn.nll.sum() / drawn.tokens.sum()))
    figures = all_figures(built)["valid"]
    low, high = np.quantile(ppls, [0.025, 0.975])
    width = high - low
    assert figures["ppl_low"] == pytest.approx(low, abs=0.1 * width)
    assert figures["ppl_high"] == pytest.approx(high, abs=0.1 * width)


def test_many_documents_share_rows_and_none_is_lost(built, tmp_path, monkeypatch):
    shutil.copy(built / "data/test.txt", tmp_path)
    write_blocks(corpus_of(tmp_path / "test.txt", "line"), built / "models/gpt2", tmp_path / "blocks")
    split, model = load_split("train", tmp_path / "blocks"), load_model(built / "models/gpt2")
    settings = SimpleNamespace(stride=None, batch_size=8, precision="32-true")
    whole = scoring.figures_of(model, split, settings)[2]["documents"]
    assert list(whole.document) == list(range(1, 25))
    monkeypatch.setattr(scoring, "DOCUMENT_ROWS", 5)
    small = scoring.figures_of(model, split, settings)[2]["documents"]
    assert list(small.document) == [1, 6, 11, 16, 21]
    for column in ("tokens", "bytes", "words", "nll"):
        sums = [whole[column][i : i + 5].sum() for i in range(0, 24, 5)]
        assert list(small[column]) == pytest.approx(sums), column


def test_named_test_sets_have_their_own_figures(project):
    """Each as if it were test_file, between test and valid."""
    shutil.copy(project / "data/valid.txt", project / "data/other.txt")
    set_params(project, "data.test_files={other: data/other.txt}")
    for stage in ("prepare_corpus", "tokenize_blocks", "evaluate"):
        status, _, err = run_stage(project, stage)
        assert status == 0, err
    figures, details = (json.loads((project / f"metrics/{name}.json").read_text()) for name in ("eval", "details"))
    assert list(figures) == list(details) == ["test", "other", "valid"]
    assert figures["other"] == figures["valid"] and details["other"]["text"] == details["valid"]["text"]
    assert list(pd.read_csv(project / "metrics/documents.csv").set.unique()) == ["test", "other", "valid"]


def test_text_without_spaces_has_no_word_ppl(project, tmp_path):
    """Japanese: a "word" would be a whole line."""
    (tmp_path / "japanese.txt").write_text("吾輩は猫である。名前はまだ無い。どこで生れたか頓と見当がつかぬ。\n\n" * 9)
    test = measured(project, tmp_path / "japanese.txt")
    assert "word_ppl" not in test and test["words"] == 9


def test_a_loss_that_exp_cannot_take(project):
    """Above 709 nats a token: perplexities end at exp(700), the one of words is left out, and comparing goes on."""
    file = project / "models/gpt2/model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["transformer.ln_f.weight"] *= 1e5
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    assert run_stage(project, "evaluate")[0] == 0
    for figures in all_figures(project).values():
        assert figures["loss"] > 710 and figures["ppl"] == figures["ppl_high"] == math.exp(700)
        assert figures["bits_per_byte"] > 100 and "word_ppl" not in figures
    status, out, err = run_stage(project, "tools.compare", "HEAD", "workspace", "--json")
    assert status == 0, err
    ppl = json.loads(out)["sets"]["test"]["ppl"]
    assert ppl["b"] == math.exp(700) and ppl["low"] > 0


def test_model_option_measures_a_folder_on_any_text(project, tmp_path):
    committed = (project / "metrics/eval.json").read_bytes()
    pipeline = all_figures(project)["test"]
    printed = measured(project, project / "data/test.txt")
    assert printed == {key: pipeline[key] for key in printed} and pipeline.keys() - printed.keys() == {"unigram_ppl"}
    (tmp_path / "other.txt").write_text("Zwölf Boxkämpfer\n\nüber den Sylter Deich\n" * 9)
    other = measured(project, tmp_path / "other.txt")
    expected = independent_figures(project / "models/gpt2", (tmp_path / "other.txt").read_text(), 16)
    assert {key: other[key] for key in expected} == pytest.approx(expected, rel=1e-5)
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


def measured(project, test_file) -> dict:
    """What `--model` prints of a text."""
    command = ("--model", "models/gpt2", "--data.test_file", str(test_file))
    status, out, err = run_stage(project, "evaluate", *command)
    assert status == 0, err
    return json.loads(out)["test"]
