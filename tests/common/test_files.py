"""A disk with no space left, at the writes of libraries that say so in their own ways."""

import resource

import pytest
from conftest import run_stage
from transformers import GPT2LMHeadModel


def files(project) -> dict:
    folders = (project / "models/gpt2", project / "models/tokenizer")
    return {file: file.read_bytes() for folder in folders for file in folder.iterdir()}


@pytest.fixture
def full_disk():
    """Makes every file end at 1,000 bytes, until the test ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def check(project, stage: str, *arguments: str) -> None:
    before = files(project)
    status, _, err = run_stage(project, stage, *arguments)
    line = err.splitlines()[-1]
    assert (status, line[:7]) == (1, "error: ") and "can't be written (" in line and "free some disk space" in line, err
    assert files(project) == before


def test_train_tokenizer(project, full_disk):
    full_disk()
    check(project, "train_tokenizer")


def test_export_of_train(project, full_disk, monkeypatch):
    save = GPT2LMHeadModel.save_pretrained
    monkeypatch.setattr(
        GPT2LMHeadModel, "save_pretrained", lambda *args, **kwargs: (full_disk(), save(*args, **kwargs))
    )
    check(project, "train", "--trainer.max_steps", "2")
