"""The report of a history, read back in a real browser."""

import json
import math
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

from tools import report
from tools.runs import history

import pytest
from conftest import run, run_stage
from long_history import long_history
from made_runs import commit, made, repository, write
from selenium.webdriver.support.ui import WebDriverWait

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1> \"'&"


@pytest.fixture(scope="session")
def lived(tmp_path_factory) -> Path:
    """Two seeds, a change, another tokenizer with a hostile name, an experiment, another test text."""
    project = tmp_path_factory.mktemp("lived") / "project"
    project.mkdir()
    repository(project)
    (project / ".gitignore").write_text("report.html\n")
    for seed in (1, 2):
        commit(project, made(0.0001 * seed, seed, spread=0.002), f"Seed {seed}", width=16)
    commit(project, made(-0.05, 1, spread=0.002), "Twice the width", width=32)
    commit(project, made(-0.02, 1, spread=0.002, tokenizer="other"), HOSTILE, width=32, vocab=280)
    run("git", "checkout", "-q", "--detach", cwd=project)
    experiment = commit(project, made(-0.06, 1, spread=0.002), "dvc: commit", width=64)
    run("git", "checkout", "-q", "main", cwd=project)
    run("git", "update-ref", f"refs/exps/{experiment[:2]}/{experiment[2:]}/wide", experiment, cwd=project)
    commit(project, made(-0.02, 1, text="other"), "Other text", width=32)
    return project


@pytest.fixture(scope="session")
def page(lived) -> Path:
    status, out, err = run_stage(lived, "tools.report")
    assert status == 0 and str(lived / "report.html") in out, err
    assert run("git", "status", "--porcelain", cwd=lived).stdout == ""
    return lived / "report.html"


@pytest.fixture
def opened(page, browser):
    """The page of `lived` in the browser, at desktop width."""
    browser.get_log("browser")
    browser.get(page.as_uri())
    wait(browser, lambda: browser.find_elements("css selector", "#bits svg"))
    return browser


def wait(browser, condition: Callable[[], bool]) -> None:
    """Until the page has drawn what is expected; fails after 20 seconds."""
    WebDriverWait(browser, 20, poll_frequency=0.05).until(lambda _: condition())


def texts(browser, selector: str) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText.trim())", selector
    )


def lines_drawn(browser, plot: str) -> int:
    """Lines with at least two points."""
    return browser.execute_script(
        "return [...document.querySelectorAll(`#${arguments[0]} .mark-line path`)]"
        ".filter((path) => path.getAttribute('d').includes('L')).length",
        plot,
    )


def select(browser, *numbers: int) -> None:
    """Leaves just these rows selected."""
    for i, box in enumerate(browser.find_elements("css selector", "#runs input")):
        if box.is_selected() != (i in numbers):
            browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", box)  # from under the header
            box.click()


def test_page_shows_the_committed_figures_newest_first(opened, lived):
    names = texts(opened, "#runs tbody .name b")
    assert set(names) == {"Other text", "wide", HOSTILE, "Twice the width", "Seed 2"}  # seed 1 is folded
    opened.find_element("css selector", "#runs .seeds").click()
    cells = opened.execute_script(
        "return [...document.querySelectorAll('#runs [data-figure]')]"
        ".map((e) => [e.closest('tr').dataset.revision, e.dataset.figure, e.textContent])"
    )
    shown = {}
    for revision, figure, text in cells:
        shown.setdefault(revision, {})[figure] = float(text.replace(",", ""))
    assert len(shown) == 6
    for revision, figures in shown.items():
        expected = json.loads(run("git", "show", f"{revision}:metrics/eval.json", cwd=lived).stdout)["test"]
        assert figures["ppl"] == pytest.approx(expected["ppl"], abs=0.00501)
        assert figures["bits"] == pytest.approx(expected["bits_per_byte"], abs=0.000501)


def row_with(browser, text: str) -> str:
    return next(" ".join(row.split()) for row in texts(browser, "#runs tbody tr") if text in row)


def test_rows_say_the_verdict_of_tools_compare_and_what_changed(opened, lived):
    width = row_with(opened, "Twice the width")
    assert re.search(r"better −0\.07\d+ beyond test documents and seeds", width) and "width 16 → 32" in width
    out = run_stage(lived, "tools.compare", "HEAD~3", "HEAD~2", "--json")[1]
    difference = json.loads(out)["sets"]["test"]["bits_per_byte"]["difference"]
    assert f"{difference:.4f}".replace("-", "−") in width
    for name, expected in (
        ("Twice the width", ["seed_everything 2 → 1", "width 16 → 32"]),
        (HOSTILE, ["vocab new: 280"]),
    ):
        found = texts(opened, f"#runs tr[data-revision='{opened.execute_script(REVISION, name)}'] .change")
        assert [" ".join(text.split()) for text in found] == expected  # and no other
    assert "worse" in row_with(opened, HOSTILE[:9]) and "vocab new: 280" in row_with(opened, HOSTILE[:9])
    assert "can't be compared the text of test differs" in row_with(opened, "Other text")
    assert "experiment" in row_with(opened, "wide") and "first figures" not in row_with(opened, "wide")
    assert len(texts(opened, "#yardsticks tbody tr")) == 3
    assert "2 % leaked" in width and "1 k parameters" in width
    assert re.search(r"news: better −0\.07", width), width  # each test set has its own


def test_seeds_are_one_row_that_opens(opened, lived):
    bits = [figures_at(lived, f"HEAD~{i}")["bits_per_byte"] for i in (3, 4)]
    shown = f"2 seeds: {statistics.mean(bits):.4f} ± {statistics.stdev(bits):.4f}"
    assert shown in row_with(opened, "Seed 2")
    assert "Seed 1" not in texts(opened, "#runs tbody .name b")
    opened.find_element("css selector", "#runs .seeds").click()
    assert "first figures" in row_with(opened, "Seed 1")
    opened.find_elements("css selector", "#runs th button")[2].click()  # by ppl: it stays below its group
    names = texts(opened, "#runs tbody .name b")
    assert names.index("Seed 1") == names.index("Seed 2") + 1


def test_header_sorts_by_mouse_and_keyboard(opened):
    shown = "#runs tr:not([hidden]) [data-figure=ppl]"
    figures = lambda: [float(text.replace(",", "")) for text in texts(opened, shown)]  # noqa: E731
    header = opened.find_elements("css selector", "#runs th")[3]
    header.find_element("css selector", "button").click()
    assert figures() == sorted(figures()) and header.get_attribute("aria-sort") == "ascending"
    header.find_element("css selector", "button").send_keys("\n")
    assert figures() == sorted(figures(), reverse=True) and header.get_attribute("aria-sort") == "descending"


def test_the_newest_commit_and_the_one_before_it_are_selected_at_first(opened):
    """Whatever experiments stand between them."""
    opened.refresh()
    wait(opened, lambda: opened.find_elements("css selector", "#bits svg"))
    names = texts(opened, "#runs tbody .name b")
    chosen = opened.execute_script(
        "return [...document.querySelectorAll('#runs tbody tr')].map(r => r.classList.contains('selected'))"
    )
    assert [name for name, on in zip(names, chosen) if on] == ["Other text", HOSTILE]


def test_selected_runs_are_drawn_and_compared(opened):
    rows = texts(opened, "#runs tbody .name b")
    select(opened, rows.index("Twice the width"), rows.index("Seed 2"))
    wait(opened, lambda: lines_drawn(opened, "curves") == 4)  # training and validation of two
    assert not opened.find_element("id", "warning").is_displayed()
    compared = texts(opened, "#compare tbody tr")
    assert any("width" in row and "16" in row and "32" in row for row in compared)
    assert [row.split("\t")[0] for row in compared if " ppl" in row] == ["test ppl", "news ppl", "valid ppl"]
    select(opened, rows.index("Twice the width"), 0)
    assert "different letters" in opened.find_element("id", "warning").text
    # Axes show names, not hashes.
    assert "Twice the width" in opened.execute_script("return document.querySelector('#bits svg').textContent")


def figures_at(project: Path, revision: str) -> dict:
    return json.loads(run("git", "show", f"{revision}:metrics/eval.json", cwd=project).stdout)["test"]


def test_changes_and_bars_have_the_sign_of_the_committed_figures(opened, lived):
    """The run less its parent, each the mean over its seeds; a bar lies left of its middle where bits were saved."""
    bits = [figures_at(lived, f"HEAD~{i}")["bits_per_byte"] for i in range(5)]
    other, width, seeds = bits[1], bits[2], (bits[3] + bits[4]) / 2
    wide = figures_at(lived, opened.execute_script(REVISION, "wide"))["bits_per_byte"]
    for name, expected in (("Twice the width", width - seeds), (HOSTILE, other - width), ("wide", wide - other)):
        cell = f"#runs tr[data-revision='{opened.execute_script(REVISION, name)}'] .change-cell [data-set=test]"
        (shown,) = texts(opened, f"{cell} .delta")
        assert float(shown.replace("−", "-")) == pytest.approx(expected, abs=0.000051)
        assert texts(opened, f"{cell} b") == ["better" if expected < 0 else "worse"]
        (title,) = opened.execute_script(STYLES, f"{cell} .bar", "title")
        low, high = (float(x.replace("−", "-")) for x in re.findall(r"[+−]\d\.\d+", title))
        ((left, size),) = (re.findall(r"[\d.]+", x) for x in opened.execute_script(STYLES, f"{cell} .bar i", "style"))
        ((middle,),) = (re.findall(r"[\d.]+", x) for x in opened.execute_script(STYLES, f"{cell} .bar u", "style"))
        ends = [float(left) - 50, float(left) + float(size) - 50, float(middle) - 50]
        scale = ends[2] / expected
        assert scale > 0 and ends == pytest.approx([low * scale, high * scale, expected * scale], rel=0.01)
        assert 40 < max(map(abs, ends)) <= 50


REVISION = """return [...document.querySelectorAll('#runs tbody tr')]
    .find((row) => row.querySelector('.name b').textContent === arguments[0]).dataset.revision"""
STYLES = "return [...document.querySelectorAll(arguments[0])].map((e) => e.getAttribute(arguments[1]))"


def test_the_best_card_is_the_lowest_mean_on_the_same_text(tmp_path, monkeypatch):
    """One seed of a recipe is the best run of all, but not its mean over seeds; a run on another text doesn't count."""
    monkeypatch.setattr(report, "BUNDLE", "print()")  # nobody opens the page
    repository(tmp_path)
    for message, bits, seed, more in (
        ("unlucky", 0.05, 1, {}), ("lucky", -0.09, 2, {}), ("best", -0.04, 1, {"lr": 2}),
        ("elsewhere", -0.2, 1, {"lr": 3}), ("newest", 0.0, 1, {"lr": 4}),
    ):  # fmt: skip
        commit(tmp_path, made(bits, seed, 400, text="t" if message != "elsewhere" else "u"), message, **more)
    assert run_stage(tmp_path, "tools.report")[0] == 0
    html = (tmp_path / "report.html").read_text()
    cards = re.findall(r'<div class="card"><h3>(.*?)</h3>.*?<b>.*?<b>([\d.]+)<.*?<div class="name">(\w+)', html, re.S)
    expected = [("Newest run", "newest", "HEAD"), ("Best bits per byte on the same test text", "best", "HEAD~2")]
    assert cards == [(t, f"{figures_at(tmp_path, at)['bits_per_byte']:.3f}", name) for t, name, at in expected]


def test_bits_per_byte_are_those_of_the_figures(opened, lived):
    """In the plot, in the comparison, and in the curves of runs whose tokenizers differ."""
    labels = opened.execute_script(STYLES, "#bits .mark-symbol path[aria-label]", "aria-label")
    opened.find_element("css selector", "#runs .seeds").click()
    revisions = opened.execute_script(STYLES, "#runs tbody tr", "data-revision")
    plotted = sorted(float(re.search(r"value: ([\d.]+)", label)[1]) for label in labels)
    committed = sorted(figures_at(lived, revision)["bits_per_byte"] for revision in revisions)
    assert len(plotted) == 6 and plotted == pytest.approx(committed, abs=1e-6)
    rows = texts(opened, "#runs tbody .name b")
    select(opened, rows.index("Twice the width"), rows.index(HOSTILE))
    wait(opened, lambda: lines_drawn(opened, "curves") == 2)  # of validation only
    assert "bits per byte" in opened.find_element("id", "curves-title").text
    names = texts(opened, "#compare thead th.name")
    shown = {row.split("\t")[0]: row.split("\t")[1:] for row in texts(opened, "#compare tbody tr")}
    labels = opened.execute_script(STYLES, "#curves .mark-symbol path[aria-label]", "aria-label")
    ends = [float(re.search(r"loss: ([\d.]+)", label)[1]) for label in labels]
    for name in ("Twice the width", HOSTILE):
        revision = opened.execute_script(REVISION, name)
        expected, (column,) = figures_at(lived, revision), [i for i, text in enumerate(names) if text.startswith(name)]
        assert shown["test bits per byte"][column] == f"{expected['bits_per_byte']:.3f}"
        assert shown["test ppl"][column] == f"{expected['ppl']:.2f}"
        # The last point of made_runs' valid.csv is ppl / 10 nats a token, where eval.json has 1 and its bits.
        last = expected["ppl"] / 10 * expected["bits_per_byte"]
        assert any(end == pytest.approx(last, abs=2e-4) for end in ends), (last, ends)


def test_page_is_safe_offline_and_quiet(opened):
    select(opened, 0, 1)
    assert opened.execute_script("return window.hacked") is None
    assert any(HOSTILE in text for text in texts(opened, "#runs .name b"))
    assert opened.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert [entry for entry in opened.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")] == []


def test_page_fits_a_phone_and_the_dark(opened):
    def media(scheme: str) -> None:
        screen = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
        opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def light() -> int:
        colour = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in re.findall(r"\d+", colour)[:3])

    label = "return document.querySelector('#bits .role-axis-label text')?.getAttribute('fill')"
    try:
        media("light")
        wait(opened, lambda: opened.execute_script("return document.documentElement.scrollWidth") == 360)
        top = "return document.querySelector(arguments[0]).getBoundingClientRect().top"
        assert opened.execute_script(top, "#runs tbody .change-cell") < opened.execute_script(top, "#runs tbody .name")
        assert light() > 600
        before = opened.execute_script(label)
        media("dark")
        wait(opened, lambda: light() < 150 and opened.execute_script(label) not in (None, before))
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_uncommitted_figures_are_the_first_row(lived, tmp_path, monkeypatch):
    run("git", "clone", "-q", str(lived), "project", cwd=tmp_path)
    monkeypatch.chdir(tmp_path / "project")
    write(tmp_path / "project", made(-0.1, 1, text="other"), width=32)
    rows = report.described(history(report.MORE))
    assert rows[0]["run"].place == "workspace" and rows[0]["verdicts"]["test"]["bits_per_byte"]["difference"] < 0
    (tmp_path / "project/dvc.lock").unlink()
    rows = report.described(history(report.MORE))
    assert rows[0]["unknown"] == "no dvc.lock" and "unknown: no dvc.lock" in report.page(rows, "")


def test_since_and_the_templates_own_history(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "BUNDLE", "print()")  # nobody opens these pages
    repository(tmp_path)
    own, sample = {"data.train_file": "mine.txt"}, {"data.train_file": "data/sample/train.txt"}
    commit(tmp_path, made(0.3), "the template's", **sample)
    commit(tmp_path, made(0.2), "mine", **own)
    commit(tmp_path, made(0.1), "mine again", **own)
    assert "2 runs (1 on the sample text left out: --all)" in run_stage(tmp_path, "tools.report")[1]
    assert ": 3 runs," in run_stage(tmp_path, "tools.report", "--all")[1]
    assert ": 2 runs," in run_stage(tmp_path, "tools.report", "--since", "HEAD~1")[1]
    status, _, err = run_stage(tmp_path, "tools.report", "--since", "nothing")
    assert status == 1 and err == "error: --since: nothing: no such revision\n"


def test_odd_histories(tmp_path, monkeypatch):
    project = tmp_path / "project"
    project.mkdir()
    repository(project)
    first = commit(project, made(0.5), "first")
    run("git", "checkout", "-q", "-b", "side", cwd=project)
    side = commit(project, made(0.4), "side", wing=1)
    run("git", "checkout", "-q", "main", cwd=project)
    main = commit(project, made(0.3), "main", wing=2)
    run("git", "merge", "-q", "--no-commit", "-s", "ours", "side", cwd=project, check=False)
    merged = commit(project, made(0.2), "merged", wing=3)
    (project / "metrics/eval.json").write_text('{"test": {"ppl": NaN}}')
    run("git", "rm", "-q", "dvc.lock", "metrics/documents.csv", "metrics/details.json", cwd=project)
    run("git", "commit", "-qam", "a figure that is none", cwd=project)
    monkeypatch.chdir(project)
    found = {run.name: run for run in history()}
    assert found["merged"].merge and found["merged"].parent == main and found["side"].parent == first
    assert found["a figure that is none"].unknown == "no dvc.lock"
    rows = report.described(history(report.MORE))
    assert rows[0]["letter"] == "?" and math.isnan(rows[0]["ppl"])
    assert rows[0]["verdicts"]["test"]["verdict"] == "can't be compared" and "unknown: no dvc.lock" in report.page(
        rows, ""
    )
    run("git", "clone", "-q", "--depth", "1", "-b", "side", project.as_uri(), "shallow", cwd=tmp_path)
    monkeypatch.chdir(tmp_path / "shallow")
    (alone,) = history()
    assert alone.revision == side and alone.cut and merged != side


def test_hundreds_of_commits(tmp_path, monkeypatch):
    """A page of them all, each with its verdict; `python tests/long_history.py` measures thousands."""
    long_history(tmp_path, 200)
    monkeypatch.chdir(tmp_path)
    rows = report.described(history(report.MORE))
    page = report.page(rows, "")
    assert all(row["verdicts"]["test"]["bits_per_byte"] for row in rows[:-1])
    assert page.count("<tr data-revision") == 200 and page.count("data-seed-of") >= 132 and len(page) < 4e6


def test_mistakes_are_one_line(template, tmp_path):
    def error(*arguments: str, cwd: Path) -> str:
        done = run("python", "-m", "tools.report", *arguments, cwd=cwd, check=False)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    young = tmp_path / "young"
    shutil.copytree(template, young)
    shutil.rmtree(young / "metrics", ignore_errors=True)
    shutil.rmtree(young / ".git")
    run("git", "init", "-q", cwd=young)
    assert "no figures yet" in error(cwd=young)
    assert "--help" in error("--sort", "ppl", cwd=young)
    shutil.rmtree(young / ".git")
    assert "not a git repository" in error(cwd=young)


def test_two_block_sizes_without_overlap_have_one_letter():
    runs = [made(0, stride=16), made(-0.05, stride=32), made(-0.02, stride=8)]
    for each, block_size in zip(runs, (16, 32, 32)):
        each.params["model.block_size"] = block_size
        each.more = {name: keep(None) for name, keep in report.MORE.items()}
    letters = {row["run"].detail("test", "stride"): row["letter"] for row in report.described(runs)}
    assert letters[16] == letters[32] != letters[8]
