"""Verdicts: calibrated on simulated pairs, and read from a Git history as the command does."""

import json
import math
import re
from pathlib import Path

from stages.common.errors import UserError
from stages.model.intervals import interval
from tools.compare import noise_text
from tools.verdict import Noise, call, judge, noise_of

import numpy as np
import pytest
from conftest import run, run_stage
from made_runs import commit, made, repository


def scored(random, rows: int, difference: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nats of two models on the same documents, B's worse by `difference` a byte, and the documents' bytes."""
    size = np.rint(random.lognormal(7.5, 0.6, rows))
    a = size * (0.9 + random.normal(0, 0.15, rows))  # some documents are hard for both
    b = a + size * (difference + random.normal(0, 0.02, rows)) + np.sqrt(size) * random.normal(0, 0.2, rows)
    return a, b, size


@pytest.mark.parametrize("difference", [0.0, 0.01])
@pytest.mark.parametrize("rows", [20, 60, 300])
def test_interval_holds_the_true_difference_in_95_of_100(rows, difference):
    random = np.random.default_rng(rows)
    held = 0
    for _ in range(200):
        a, b, size = scored(random, rows, difference)
        low, high = interval(b - a, size)
        held += low <= difference <= high
    assert 0.93 <= held / 200 <= 0.97


def test_interval_is_that_of_documents_drawn_one_by_one():
    random = np.random.default_rng(0)
    a, b, size = scored(random, 60, 0.01)
    drawn = random.integers(60, size=(20_000, 60))
    expected = np.quantile((b - a)[drawn].sum(1) / size[drawn].sum(1), [0.025, 0.975])
    width = expected[1] - expected[0]
    assert interval(b - a, size) == pytest.approx(expected, abs=0.05 * width)
    alone = interval(b, size)[1] - interval(b, size)[0]
    assert width < alone / 5  # that is what pairing is for


def test_a_word_needs_documents_and_seeds():
    small = Noise(0.001, 4, "5 seeds")
    a, better, worse, close = (made(value) for value in (0, -0.05, 0.05, 0.0005))
    assert judge([a], [better], "test", small)["verdict"] == "better"
    assert judge([a], [worse], "test", small)["verdict"] == "worse"
    unsure = judge([a], [close], "test", small)
    assert unsure["verdict"] == "can't tell" and "times the test text" in unsure["why"]
    assert judge([a], [better], "test", Noise(0.1, 4, "5 seeds"))["verdict"] == "can't tell"
    assert "more seeds of each" in judge([a], [better], "test", Noise(0.1, 4, "5 seeds"))["why"]
    unknown = judge([a], [better], "test", None)
    assert unknown["verdict"] == "can't tell" and "training noise is unknown" in unknown["why"]
    few = judge([made(0, rows=3)], [made(-0.05, rows=3)], "test", small)
    assert few["verdict"] == "can't tell" and "3 test documents" in few["why"]
    one = judge([made(0, rows=1)], [made(-0.05, rows=1)], "test", small)
    assert one["verdict"] == "can't tell" and one["bits_per_byte"]["low"] == -math.inf


def test_what_it_would_take_is_about_right():
    """With as many times the test text, or as many seeds, as it says, it can tell."""
    noise = Noise(0.0, 4, "5 seeds")
    a, b = made(0, seed=3), made(-0.002, seed=4)
    unsure = judge([a], [b], "test", noise)
    assert unsure["verdict"] == "can't tell"
    times = int(unsure["why"].split(" times")[0].split()[-1])
    half = (unsure["bits_per_byte"]["high"] - unsure["bits_per_byte"]["low"]) / 2
    assert half / math.sqrt(times) <= abs(unsure["bits_per_byte"]["difference"]) * 1.01
    noise = Noise(0.1, 4, "5 seeds")
    unsure = judge([made(0)], [made(-0.05)], "test", noise)
    seeds = int(re.search(r"(\d+) more seeds of each", unsure["why"])[1]) + 1
    difference = abs(unsure["bits_per_byte"]["difference"])
    assert 1.96 * noise.sd * math.sqrt(2 / seeds) < difference < 1.96 * noise.sd * math.sqrt(2 / (seeds - 2))
    # Neither documents nor seeds alone hide it: one side's three runs against one of the other.
    bits = {"difference": -1.0, "low": -1.6, "high": -0.4, "with_seeds": [-2.1, 0.1]}
    assert "3 more seeds of each" in call(bits, noise, 0.9, 3, 1, 50, False)[1]


def test_figures_are_those_of_the_runs_and_pairs_that_differ_are_refused():
    a, b = made(0), made(-0.05)
    found = judge([a], [b], "test", None)
    for key, places in (("bits_per_byte", 1e-9), ("ppl", 1e-9)):
        assert found[key]["a"] == pytest.approx(a.figures["test"][key], rel=places)
        assert found[key]["difference"] == pytest.approx(b.figures["test"][key] - a.figures["test"][key], rel=1e-6)
        assert found[key]["low"] < found[key]["difference"] < found[key]["high"] < 0
    for details, why in (
        ({"text": "other"}, "the text of test differs"),
        ({"stride": 4}, "evaluate.stride differs"),
        ({"tokenizer": "other", "changed_documents": 2}, "changes the text of test"),
    ):
        refused = judge([a], [made(-0.05, **details)], "test", None)
        assert refused["verdict"] == "can't be compared" and why in refused["why"]
    lossy = [made(value, changed_documents=2) for value in (0, -0.05)]
    assert found["exact"] and not judge(lossy[:1], lossy[1:], "test", None)["exact"]
    shorter, longer = made(0, stride=16), made(-0.05, stride=32)  # no windows that overlap, of two models
    shorter.params["model.block_size"], longer.params["model.block_size"] = 16, 32
    assert judge([shorter], [longer], "test", None)["bits_per_byte"]["difference"] < 0
    longer.params["model.block_size"] = 64
    assert judge([shorter], [longer], "test", None)["why"] == "evaluate.stride differs"
    other = judge([a], [made(-0.05, tokenizer="other")], "test", None)
    assert other["ppl"] is None and other["bits_per_byte"]["difference"] < 0


@pytest.fixture
def lived(tmp_path) -> Path:
    """Three seeds at lr 1, then a change, then another text."""
    repository(tmp_path)
    for seed in (1, 2, 3):
        commit(tmp_path, made(0.0001 * seed, seed, spread=0.002), f"seed {seed}", lr=1)
    commit(tmp_path, made(-0.05, 1, spread=0.002), "lr 2", lr=2)
    commit(tmp_path, made(-0.05, 1, text="other"), "other text", lr=2)
    return tmp_path


def compare(project: Path, *arguments: str) -> tuple[int, str, str]:
    return run_stage(project, "tools.compare", *arguments)


def test_the_command_reads_revisions_seeds_and_the_workspace(lived):
    status, out, _ = compare(lived, "HEAD~2", "HEAD~1", "--json")
    found = json.loads(out)
    assert status == 0 and found["sets"]["test"]["verdict"] == "better"
    assert sorted(found["seeds"]["a"]) == [1, 2, 3] and found["seeds"]["b"] == [1]
    assert found["seeds"]["noise"]["test"]["degrees"] == 2
    status, out, _ = compare(lived, "HEAD~1", "HEAD~2", "--fail-if-worse")
    assert status == 1 and "test: WORSE" in out
    status, out, _ = compare(lived, "HEAD~3", "HEAD~2")
    assert status == 0 and re.search(r"only the seed differs: training noise, ± 0\.\d+ over 3 seeds of \w+", out)
    # By default the last run against the one before it, whose text was another.
    status, out, _ = compare(lived)
    assert status == 0 and "CAN'T BE COMPARED: the text of test differs" in out
    (lived / "metrics/eval.json").write_text(json.dumps(made(-0.5).figures))
    status, out, _ = compare(lived, "HEAD~1")
    assert status == 0 and "A: " in out and "B: workspace" in out
    status, out, _ = compare(lived, "--noise", "HEAD~2")
    assert status == 0 and "3 seeds" in out and "±" in out
    status, _, err = compare(lived, "nothing")
    assert status == 1 and err.startswith("error: nothing: no such revision or experiment") and err.count("\n") == 1


def test_a_change_that_leaves_the_figures_as_they_are_keeps_the_seeds(tmp_path):
    """A commit that changes dvc.lock alone, as code written otherwise does, is no other recipe."""
    repository(tmp_path)
    commit(tmp_path, made(0.0001, 1, spread=0.002), "seed 1", lr=1)
    commit(tmp_path, made(0.0002, 2, spread=0.002), "seed 2", lr=1)
    commit(tmp_path, made(0.0002, 2, spread=0.002), "written otherwise", lr=1, written="otherwise")
    commit(tmp_path, made(0.0003, 3, spread=0.002), "seed 3", lr=1, written="otherwise")
    for revision in ("HEAD", "HEAD~1", "HEAD~3"):
        assert "3 seeds (1, 2, 3)" in compare(tmp_path, "--noise", revision)[1]
    commit(tmp_path, made(-0.05, 1, spread=0.002), "another", lr=2, written="otherwise")
    assert "one seed only (1)" in compare(tmp_path, "--noise", "HEAD")[2]


def test_an_experiment_that_others_have_pushed(lived, tmp_path):
    run("git", "checkout", "-q", "--detach", "HEAD~1", cwd=lived)
    experiment = commit(lived, made(-0.1, 1, spread=0.002), "dvc: commit", lr=4)
    run("git", "update-ref", f"refs/exps/{experiment[:2]}/{experiment[2:]}/wide", experiment, cwd=lived)
    run("git", "checkout", "-q", "main", cwd=lived)
    run("git", "clone", "-q", str(lived), "clone", cwd=tmp_path)
    assert compare(tmp_path / "clone", "HEAD~1", "wide")[0] == 1
    run("git", "fetch", "-q", "origin", "refs/exps/*:refs/exps/*", cwd=tmp_path / "clone")
    status, out, _ = compare(tmp_path / "clone", "HEAD~1", "wide")
    assert status == 0 and "test: BETTER" in out and "B: wide" in out
    # One that has the figures of the commit before it is that run.
    same = run("git", "commit-tree", "-p", "HEAD~1", "-m", "dvc: commit", "HEAD~1^{tree}", cwd=lived).stdout.strip()
    run("git", "update-ref", f"refs/exps/{same[:2]}/{same[2:]}/same", same, cwd=lived)
    assert "test: BETTER" in compare(lived, "same", "wide")[1]


def test_noise_is_lent_by_the_nearest_group_of_the_same_size(lived):
    commit(lived, made(-0.05, 1, spread=0.002), "lr 2 again", lr=2)
    commit(lived, made(-0.08, 1, spread=0.002), "lr 3", lr=3)
    _, out, _ = compare(lived, "HEAD~1", "HEAD", "--json")
    found = json.loads(out)
    assert "taken from 3 seeds" in found["seeds"]["noise"]["test"]["source"]
    assert found["sets"]["test"]["verdict"] == "better"


def test_noise_is_not_lent_where_a_size_is_unknown():
    group, a, b = [made(0.0001 * seed, seed) for seed in (1, 2, 3)], made(-0.05), made(-0.08)
    for lr, each in enumerate((*group, a, b)):
        each.timing, each.params["lr"] = {"parameters": 1000}, max(0, lr - 2)
    assert noise_of(a, b, "test", {group[0].recipe: group}).degrees == 2
    b.timing = {}
    assert noise_of(a, b, "test", {group[0].recipe: group}) is None
    assert noise_of(b, a, "test", {group[0].recipe: group}) is None


def test_a_seed_without_figures_has_no_noise():
    group = [made(0, seed) for seed in (1, 2)]
    group[1].figures = {"test": {}}
    with pytest.raises(UserError, match="a seed has no bits per byte of test"):
        noise_text(group[0], {group[0].recipe: group}, as_json=False)
