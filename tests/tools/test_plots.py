"""The plots of dvc.yaml, as a browser without a network draws them."""

import shutil
from pathlib import Path
from types import SimpleNamespace

from stages import evaluate
from stages.model.gpt2 import load_model
from stages.text.streams import load_split, write_blocks
from stages.text.tokenizers import load_tokenizer

import pandas as pd
import pytest
from conftest import corpus_of, run, set_params
from selenium.webdriver.support.wait import WebDriverWait

TITLES = {
    "Documents by length": ("bytes, at most", "share of the documents"),
    "Training and validation loss": ("tokens seen", "loss (nats a token)"),
    "Learning rate": ("tokens seen", "learning rate"),
    "Validation loss": ("tokens seen", "loss (nats a token)"),
    "Test loss by position in the block (how much context helps)": (
        "position in the block (tokens of context)",
        "loss (nats a token)",
    ),
    "Test loss by document, easiest first": ("documents, sorted by loss", "loss (nats a token)"),
}


@pytest.fixture(scope="module")
def two_commits(built, tmp_path_factory) -> Path:
    project = tmp_path_factory.mktemp("two") / "project"
    shutil.copytree(built, project)
    set_params(project, "trainer.max_epochs=1")
    run("dvc", "repro", cwd=project)
    run("git", "commit", "-qam", "one epoch", cwd=project)
    run("python", "-m", "tools.offline_plots", cwd=project)
    return project


def drawn(browser, page: Path) -> dict[str, dict]:
    """Title -> axis labels, legend, and how many points each line has, by revision and kind of stroke."""
    browser.get_log("browser")
    browser.get(page.as_uri())
    WebDriverWait(browser, 20).until(lambda _: browser.execute_script(
        "const divs = document.querySelectorAll('body > div');"
        "return divs.length && [...divs].every(div => div.querySelector('svg.marks'))"
    ))  # fmt: skip
    return browser.execute_script("""
        const texts = (svg, role) => [...svg.querySelectorAll(`.role-${role} text`)].map(t => t.textContent);
        const plots = {};
        for (const svg of document.querySelectorAll('svg.marks')) {
            const lines = {};
            for (const path of svg.querySelectorAll('g.mark-line path')) {
                const name = `${path.getAttribute('stroke')} ${path.getAttribute('stroke-dasharray')}`;
                lines[name] = path.getAttribute('d').split('L').length;
            }
            plots[texts(svg, 'title-text')[0]] = {
                axes: texts(svg, 'axis-title'), legend: texts(svg, 'legend-label'), lines: Object.values(lines)};
        }
        return plots;
    """)


def rows(project: Path, revision: str, name: str) -> int:
    return len(run("git", "show", f"{revision}:metrics/{name}.csv", cwd=project).stdout.splitlines()) - 1


def test_plots_between_two_commits(two_commits, browser):
    page = Path(run("dvc", "plots", "diff", "HEAD~1", "HEAD", cwd=two_commits).stdout.strip().removeprefix("file://"))
    plots = drawn(browser, page)
    assert {title: tuple(plot["axes"]) for title, plot in plots.items()} == TITLES
    loss, rate, valid, position, document = (plots[title] for title in TITLES)
    files = ["train.csv::train_loss", "valid.csv::valid_loss"]
    assert loss["legend"] == ["HEAD~1", "HEAD", *files]
    assert loss["lines"] == [rows(two_commits, rev, name) for rev in ("HEAD~1", "HEAD") for name in ("train", "valid")]
    singles = {"train": rate, "valid": valid, "loss_by_position": position, "loss_by_document": document}
    for name, plot in singles.items():
        assert plot["legend"] == ["HEAD~1", "HEAD"]
        assert plot["lines"] == [rows(two_commits, rev, name) for rev in ("HEAD~1", "HEAD")]
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors


def test_plots_of_the_workspace_and_of_a_fresh_clone(two_commits, browser, tmp_path):
    """A clone has the plots without `dvc pull`, and nothing that DVC complains about."""
    run("git", "clone", "-q", str(two_commits), "clone", cwd=tmp_path)
    clone = tmp_path / "clone"
    run("python", "-m", "tools.offline_plots", cwd=clone)
    for command in (("plots", "show"), ("metrics", "show"), ("metrics", "diff", "HEAD~1"), ("exp", "show", "--csv")):
        done = run("dvc", *command, cwd=clone)
        assert "failed" not in done.stdout + done.stderr
    plots = drawn(browser, clone / "dvc_plots/index.html")
    assert {title: len(plot["lines"]) for title, plot in plots.items()} == dict(zip(TITLES, (2, 1, 1, 1, 1)))
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_a_large_test_text_has_a_small_table(built, tmp_path, monkeypatch):
    """Above a number of documents, runs of neighbours share a row, and none is lost."""
    shutil.copy(built / "data/test.txt", tmp_path)
    write_blocks(corpus_of(tmp_path / "test.txt", "line"), built / "models/gpt2", tmp_path / "blocks")
    split, model = load_split("train", tmp_path / "blocks"), load_model(built / "models/gpt2")
    settings = SimpleNamespace(stride=None, batch_size=8)
    end_of_text = load_tokenizer(built / "models/gpt2").end_of_text
    whole = evaluate.figures_of(model, split, settings, end_of_text)[1]["loss_by_document"].sort_values("document")
    assert list(whole.document) == list(range(1, 25))
    monkeypatch.setattr(evaluate, "DOCUMENT_ROWS", 3)
    small = evaluate.figures_of(model, split, settings, end_of_text)[1]["loss_by_document"].sort_values("document")
    assert list(small.document) == [1, 9, 17]
    nll = (whole.tokens * whole.loss).to_numpy().reshape(3, 8).sum(1)
    assert (small.tokens * small.loss).to_numpy() == pytest.approx(nll)


def test_tables_behind_the_plots(built):
    train, valid = (pd.read_csv(built / f"metrics/{name}.csv") for name in ("train", "valid"))
    assert train.tokens.is_monotonic_increasing and valid.tokens.is_monotonic_increasing
    # A step takes 4 blocks of 16 tokens.
    assert list(train.tokens) == list(train.step * 64)
    assert list(valid.tokens) == list(valid.step * 64)
