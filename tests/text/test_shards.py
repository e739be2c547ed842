"""A token stream in several files: what is read and trained on is the stream, wherever its files end."""

import math
import os
import shutil
from pathlib import Path

from stages.text import shards, streams
from stages.text.corpus import Documents
from stages.text.streams import load_split, write_blocks
from stages.training.data import permuted

import numpy as np
import pandas as pd
import pytest
from conftest import first_loss, run_stage


@pytest.fixture
def several(built, tmp_path, monkeypatch) -> Path:
    """The small project's streams, in files of 1,000 ids."""
    monkeypatch.setattr(shards, "SHARD_TOKENS", 1000)
    splits = {name: Documents(name, built / "data/corpus") for name in ("train", "valid", "test")}
    write_blocks(splits, built / "models/tokenizer", tmp_path / "blocks")
    return tmp_path / "blocks"


def test_files_make_up_the_stream(built, several):
    whole, split = np.load(built / "data/blocks/train.npy"), load_split("train", several)
    files = sorted(several.glob("train.*[0-9].npy"), key=lambda file: int(file.suffixes[0][1:]))
    assert [len(np.load(file)) for file in [several / "train.npy", *files]] == [1000] * 9 + [323]
    assert len(split.tokens) == len(whole) == 9323
    for start, stop in [(0, 9323), (0, 1000), (999, 1000), (999, 1001), (500, 2500), (9000, 20_000), (1000, 1000)]:
        assert split.tokens[start:stop].tolist() == whole[start:stop].tolist(), (start, stop)
    assert (several / "train.json").read_text() == (built / "data/blocks/train.json").read_text()
    windows = [whole[start : start + 17].tolist() for start in (990, 0, 4321)]
    assert split.windows([990, 0, 4321], 17).tolist() == windows


def test_a_file_is_fetched_whole_when_reading_comes_to_it(several, monkeypatch):
    fetched, tokens = [], load_split("train", several).tokens
    monkeypatch.setattr(os, "posix_fadvise", lambda number, *_: fetched.append(os.readlink(f"/proc/self/fd/{number}")))
    for start in (2100, 2050, 2999, 100, 2000):
        assert len(tokens[start : start + 5]) == 5
    assert [Path(file).name for file in fetched] == ["train.2.npy", "train.npy", "train.2.npy"]


def test_tasks_write_the_same_files(built, several, tmp_path):
    paths = {name: built / f"data/corpus/{name}.arrow" for name in ("train", "valid", "test")}
    for tasks in (2, 5):
        parts = [tmp_path / f"{tasks}.{rank}" for rank in range(tasks)]
        for rank, part in enumerate(parts):
            part.mkdir()
            streams.write_part(part, rank, tasks, paths, str(built / "models/tokenizer"), "allow")
        (joined := tmp_path / f"{tasks}").mkdir()
        for name in paths:
            streams.join(joined / f"{name}.npy", parts, Documents(name, built / "data/corpus"))
        files = {file.name: file.read_bytes() for file in several.glob("*.npy")}
        assert {file.name: file.read_bytes() for file in joined.glob("*.npy")} == files


@pytest.fixture
def sharded(project, several) -> Path:
    shutil.rmtree(project / "data/blocks")
    shutil.copytree(several, project / "data/blocks")
    return project


def test_evaluation_has_the_figures_of_one_file(sharded):
    before = (sharded / "metrics/eval.json").read_text()
    (sharded / "metrics/eval.json").unlink()
    assert run_stage(sharded, "evaluate")[0] == 0
    assert (sharded / "metrics/eval.json").read_text() == before


def test_training_begins_with_the_blocks_of_one_file(sharded, built):
    """Its first loss is that of the new model on them."""
    assert run_stage(sharded, "train", "--runtime.log_every_n_steps", "1", "--trainer.max_steps", "1")[0] == 0
    edges = [math.ceil(start / 16) for start in range(0, 10_000, 1000)] + [9322 // 16]
    file = permuted(np.arange(10), 10, [1, 0, 10])[0]
    places = permuted(np.arange(4), edges[file + 1] - edges[file], [1, 0, int(file)])
    tokens = np.load(built / "data/blocks/train.npy").tolist()
    loss, _ = first_loss(sharded, [tokens[i * 16 : i * 16 + 17] for i in edges[file] + places])
    assert pd.read_csv(sharded / "metrics/train.csv").train_loss[0] == pytest.approx(loss.item(), rel=1e-5)


def test_a_missing_file_is_one_line(sharded):
    (sharded / "data/blocks/train.3.npy").unlink()
    status, _, err = run_stage(sharded, "train")
    assert status == 1 and "train.3.npy" in err and "dvc repro tokenize_blocks" in err and err.count("\n") == 1
