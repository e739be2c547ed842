"""The plots of dvc.yaml, as a browser without a network draws them."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import run, set_params
from selenium.webdriver.support.wait import WebDriverWait

TITLES = {
    "Documents by length": ("bytes, at most", "share of the documents"),
    "Training and validation loss": ("tokens seen", "loss (nats a token)"),
    "Learning rate": ("tokens seen", "learning rate"),
    "Validation loss": ("tokens seen", "loss (nats a token)"),
    "Test loss by position in the block": (
        "position in the block (tokens of context)",
        "loss (nats a token)",
    ),
    "Test loss by document, easiest first": ("documents, sorted by loss", "loss (nats a token)"),
}


@pytest.fixture(scope="module")
def two_commits(built, warm, tmp_path_factory) -> Path:
    project = tmp_path_factory.mktemp("two") / "project"
    shutil.copytree(built, project)
    set_params(project, "trainer.max_epochs=1")
    warm("dvc", "repro", cwd=project)
    run("git", "commit", "-qam", "one epoch", cwd=project)
    run("python", "-m", "tools.offline_plots", cwd=project)
    return project


def drawn(browser, page: Path) -> dict[str, dict]:
    """Title -> axis labels, legend, and how many points each line has, by revision and kind of stroke."""
    browser.get_log("browser")
    browser.get(page.as_uri())
    WebDriverWait(browser, 20).until(lambda _: browser.execute_script(
        "return document.querySelectorAll('svg.marks').length === arguments[0]", len(TITLES)
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
    """Points of a table, of documents those of the test text."""
    lines = run("git", "show", f"{revision}:metrics/{name}.csv", cwd=project).stdout.splitlines()[1:]
    return sum(line.startswith("test,") for line in lines) if name == "documents" else len(lines)


def test_plots_between_two_commits(two_commits, browser):
    page = Path(run("dvc", "plots", "diff", "HEAD~1", "HEAD", cwd=two_commits).stdout.strip().removeprefix("file://"))
    plots = drawn(browser, page)
    assert {title: tuple(plot["axes"]) for title, plot in plots.items()} == TITLES
    lengths, loss, rate, valid, position, document = (plots[title] for title in TITLES)
    assert lengths["legend"] == ["HEAD~1", "HEAD", "train", "valid", "test"]
    files = ["train.csv::train_loss", "valid.csv::valid_loss"]
    assert loss["legend"] == ["HEAD~1", "HEAD", *files]
    assert loss["lines"] == [rows(two_commits, rev, name) for rev in ("HEAD~1", "HEAD") for name in ("train", "valid")]
    singles = {"train": rate, "valid": valid, "loss_by_position": position, "documents": document}
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
    assert {title: len(plot["lines"]) for title, plot in plots.items()} == dict(zip(TITLES, (3, 2, 1, 1, 1, 1)))
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_tables_behind_the_plots(built):
    train, valid = (pd.read_csv(built / f"metrics/{name}.csv") for name in ("train", "valid"))
    assert train.tokens.is_monotonic_increasing and valid.tokens.is_monotonic_increasing
    # A step takes 4 blocks of 16 tokens.
    assert list(train.tokens) == list(train.step * 64)
    assert list(valid.tokens) == list(valid.step * 64)
