"""What one person pushes, another has after `git clone` and `dvc pull`, and runs nothing; the model card."""

import json
import math
import re
import shutil
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from conftest import run
from huggingface_hub import ModelCard
from moto.server import ThreadedMotoServer


@pytest.fixture(scope="module")
def s3_server() -> str:
    """The address of a server that speaks S3's protocol, at a port that the system picks."""
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_a_clone_that_pulls_runs_nothing(project, tmp_path, monkeypatch, request, kind):
    if kind == "folder":
        run("dvc", "remote", "add", "-d", "shared", str(tmp_path / "remote"), cwd=project)
    else:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        endpoint = request.getfixturevalue("s3_server")
        urlopen(Request(f"{endpoint}/models", method="PUT")).close()  # makes the bucket
        run("dvc", "remote", "add", "-d", "shared", "s3://models/project", cwd=project)
        run("dvc", "remote", "modify", "shared", "endpointurl", endpoint, cwd=project)
    run("git", "commit", "-qam", "where the data is shared", cwd=project)
    assert "pushed" in run("dvc", "push", cwd=project).stdout

    run("git", "clone", "-q", str(project), "colleague", cwd=tmp_path)
    colleague = tmp_path / "colleague"
    assert not (colleague / "models/gpt2").exists()
    run("dvc", "pull", cwd=colleague)
    repro = run("dvc", "repro", cwd=colleague).stdout
    assert "Running stage" not in repro
    assert "Data and pipelines are up to date." in repro
    for file in (project / "models/gpt2").iterdir():
        assert (colleague / "models/gpt2" / file.name).read_bytes() == file.read_bytes()
    assert not run("git", "status", "--short", cwd=colleague).stdout


def test_model_card(built, tmp_path):
    """Its header is read by huggingface_hub; its figures are those of the evaluation; its example works."""
    card = ModelCard.load(built / "models/gpt2/README.md")
    assert (card.data.library_name, card.data.pipeline_tag, card.data.tags) == (
        "transformers",
        "text-generation",
        ["gpt2"],
    )
    valid = json.loads((built / "metrics/eval.json").read_text())["valid"]
    figures = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert figures == pytest.approx(
        {"loss": valid["loss"], "perplexity": valid["ppl"], "bits_per_byte": valid["bits_per_byte"]}, rel=1e-5
    )
    assert f"| {valid['loss']:.4f} | {math.exp(valid['loss']):.2f} | {valid['bits_per_byte']:.4f} |" in card.text
    size = sum(len(part) for part in (built / "data/train.txt").read_bytes().strip().split(b"\n\n"))
    assert f"10 documents: {size:,} bytes" in card.text

    example = re.search(r"```python\n(.*?)```", card.text, re.S)[1]
    shutil.copytree(built / "models/gpt2", tmp_path / "model")
    (tmp_path / "model" / "example.py").write_text(example)
    assert run("python", "example.py", cwd=tmp_path / "model").stdout.startswith("The")


def test_model_card_without_validation(project, warm):
    warm("stages.train", "--trainer.limit_val_batches", "0", "--trainer.max_steps", "3", cwd=project)
    card = ModelCard.load(Path(project, "models/gpt2/README.md"))
    assert not card.data.eval_results
    assert "trained without validation" in card.text
