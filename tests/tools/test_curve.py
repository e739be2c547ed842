"""The power law of tools.curve against laws that are known."""

from stages.common.errors import UserError
from tools import curve

import made_runs
import numpy as np
import pytest

TOKENS = np.array([1e6, 2e6, 4e6, 8e6])
FURTHER = np.array([1.6e7, 3.2e7])


def law(tokens: np.ndarray) -> np.ndarray:
    return 4.0 * (tokens / 1e6) ** -0.08


def test_a_law_is_found():
    for found in curve.extrapolated(TOKENS, law(TOKENS), FURTHER):
        np.testing.assert_allclose(found, law(FURTHER), rtol=1e-6)


def test_the_interval_holds_a_further_run_19_times_of_20():
    random, held = np.random.default_rng(1), []
    for _ in range(400):
        _, low, high = curve.extrapolated(TOKENS, law(TOKENS) + random.normal(0, 0.01, 4), FURTHER)
        further = law(FURTHER) + random.normal(0, 0.01, 2)
        held.append((low < further) & (further < high))
    assert np.mean(held, axis=0) == pytest.approx([0.95, 0.95], abs=0.025)


def shown(monkeypatch, tmp_path, runs: list) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(curve, "history", lambda revisions: runs)
    monkeypatch.setattr(curve, "revisions_of", lambda names: ())
    monkeypatch.setattr("sys.argv", ["curve", *(run.name for run in runs)])
    curve.main()


def runs_of(count: int) -> list:
    runs = []
    for i, (tokens, loss) in enumerate(zip(TOKENS[:count], law(TOKENS), strict=False)):
        run = made_runs.made(0)
        run.name, run.place, run.timing = f"epochs-{i}", "experiment", {"tokens": tokens}
        run.figures["test"] = run.figures["test"] | {"loss": loss}
        run.params = {"trainer.max_epochs": i + 1, "optimizer.lr": 1e-2}
        runs.append(run)
    return runs


def test_what_is_printed_and_drawn(monkeypatch, tmp_path, capsys):
    shown(monkeypatch, tmp_path, runs_of(4)[::-1])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == [f"{2**i},000,000" for i in range(6)]
    for line, ppl in zip(printed, np.exp(law(1e6 * 2.0 ** np.arange(6))), strict=True):
        assert f"test ppl {ppl:.2f}" in line
    assert printed[-1].endswith("expected") and not printed[3].endswith("expected")
    picture = (tmp_path / "curve.svg").read_text()
    assert picture.count('aria-roledescription="line mark"') == 2


def test_other_settings_are_no_curve(monkeypatch, tmp_path):
    runs = runs_of(4)
    runs[2].params["optimizer.lr"] = 2e-2
    with pytest.raises(UserError, match="^epochs-0 and epochs-2 differ in optimizer.lr"):
        shown(monkeypatch, tmp_path, runs)


def test_what_is_not_known_is_no_curve(monkeypatch, tmp_path):
    runs = runs_of(4)
    runs[3].timing = {}
    with pytest.raises(UserError, match="^a run has no tokens in metrics/run.json, or no loss of test"):
        shown(monkeypatch, tmp_path, runs)
    for run in runs:
        run.unknown = "no dvc.lock"
    with pytest.raises(UserError, match="^epochs-0: no dvc.lock, so whether it differs in its length only isn't known"):
        shown(monkeypatch, tmp_path, runs)


def test_two_lengths_are_too_few(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="^2 lengths"):
        shown(monkeypatch, tmp_path, runs_of(2))
