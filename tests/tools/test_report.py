"""The report of a real project's history, read back in a real browser."""

import hashlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tools import report

import pytest
from conftest import run
from selenium.webdriver.support.ui import WebDriverWait

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1> \"'&"


def commit(project: Path, message: str, ppl=None, bits=None, lock=(), **files: str) -> str:
    """Commits other figures, recorded in dvc.lock as DVC would; `lock` holds (old, new) edits of it."""
    if ppl is not None:
        figures = json.loads((project / report.EVAL).read_text())
        figures["test"].update(ppl=ppl, bits_per_byte=bits)
        raw = json.dumps(figures, indent=2)
        text = re.sub(rf"(path: {report.EVAL}\n +hash: md5\n +md5: )\w+", rf"\g<1>{md5(raw)}", lock_of(project))
        (project / report.EVAL).write_text(raw)
        (project / "dvc.lock").write_text(text)
    for old, new in lock:
        assert old in lock_of(project)
        (project / "dvc.lock").write_text(lock_of(project).replace(old, new))
    for name, text in files.items():
        (project / "metrics" / name.replace("_md", ".md").replace("_csv", ".csv")).write_text(text)
    run("git", "add", "-A", cwd=project)
    run("git", "commit", "-q", "--allow-empty", "-m", message, cwd=project)
    return head(project)


def lock_of(project: Path) -> str:
    return (project / "dvc.lock").read_text()


def md5(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()


def hash_of(project: Path, path: str) -> str:
    return re.search(rf"path: {path}\n +hash: md5\n +md5: (\S+)", lock_of(project))[1]


def head(project: Path) -> str:
    return run("git", "rev-parse", "HEAD", cwd=project).stdout.strip()


def rows(project: Path, monkeypatch):
    monkeypatch.chdir(project)
    return report.compared(report.history())


def alone(built: Path, project: Path) -> Path:
    """A copy of the built project whose history is one commit."""
    shutil.copytree(built, project, ignore=shutil.ignore_patterns(".git"))
    run("git", "init", "-q", "-b", "main", cwd=project)
    run("git", "config", "user.email", "test@example.com", cwd=project)
    run("git", "config", "user.name", "Test", cwd=project)
    commit(project, "built")
    return project


@pytest.fixture
def project(built, tmp_path) -> Path:
    return alone(built, tmp_path / "project")


@pytest.fixture(scope="session")
def lived(built, tmp_path_factory) -> Path:
    """The built project, a real experiment on it, then commits with other figures and a page of them all."""
    project = alone(built, tmp_path_factory.mktemp("lived") / "project")
    run("dvc", "exp", "run", "-q", "-n", "overlap", "-S", "evaluate.stride=8", cwd=project)
    run("git", "checkout", "-q", "-f", "HEAD", cwd=project)
    time.sleep(1)  # Git dates commits by the second, and what follows is to be newer
    curve = (project / "metrics" / "valid.csv").read_text()
    lower = re.sub(r",(\d)\.", lambda match: f",{int(match[1]) - 1}.", curve)
    commit(project, "Twice the width", 41.25, 2.5, lock=[("n_embd: 16", "n_embd: 32")], valid_csv=lower)
    commit(project, "Notes on the text")
    tokenizer = hash_of(project, "models/tokenizer")
    commit(
        project,
        HOSTILE,
        999.5,
        2.25,
        lock=[(tokenizer, f"{'0' * 32}.dir"), ("vocab_size: 300", "vocab_size: 280")],
        samples_md=f'# Samples\n\nPrompt: "{HOSTILE[:9]}"\n\n    {HOSTILE}\n',
    )
    return project


@pytest.fixture(scope="session")
def page(lived) -> Path:
    done = run("python", "-m", "tools.report", cwd=lived)
    assert str(lived / "report.html") in done.stdout
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
            box.click()


def test_page_shows_the_figures_that_dvc_shows(opened, lived):
    cells = opened.execute_script(
        "return [...document.querySelectorAll('#runs [data-figure]')]"
        ".map((e) => [e.closest('tr').dataset.revision, e.dataset.figure, e.innerText])"
    )
    shown = {}
    for revision, figure, text in cells:
        shown.setdefault(revision, {})[figure] = float(text.replace(",", ""))
    expected = {}
    commits = json.loads(run("dvc", "metrics", "show", "--json", "--all-commits", cwd=lived).stdout)
    for revision, found in commits.items():
        if report.EVAL in found.get("data", {}):
            expected[revision] = found["data"][report.EVAL]["data"]["test"]
    for baseline in json.loads(run("dvc", "exp", "show", "--json", "-A", cwd=lived).stdout):
        for experiment in baseline["experiments"] or []:
            (revision,) = experiment["revs"]
            expected[revision["rev"]] = revision["data"]["metrics"][report.EVAL]["data"]["test"]
    assert len(shown) == 4
    for revision, figures in shown.items():
        assert figures["ppl"] == pytest.approx(expected[revision]["ppl"], abs=0.00501)
        assert figures["bits"] == pytest.approx(expected[revision]["bits_per_byte"], abs=0.000501)
    # Newest first, and a commit that left the figures alone has no row.
    names = texts(opened, "#runs tbody .name b")
    assert names == [HOSTILE, "Twice the width", "overlap", "built"]


def test_rows_say_what_changed_and_whether_it_is_better(opened):
    cells = [row.split("\t") for row in texts(opened, "#runs tbody tr")]
    hostile, width, overlap, built = (" ".join(" ".join(row).split()) for row in cells)
    assert "model.n_embd 16 → 32" in width
    assert re.search(r"41\.25 ▼ −[\d.]+ better 2\.500 ▼ −[\d.]+ better", width)
    assert "tokenizer.vocab_size 300 → 280" in hostile
    # Another tokenizer: no word on ppl, only on bits per byte.
    assert re.search(r"999\.50 ≠ tokenizer 2\.250 ▼ −0\.250 better", hostile)
    assert "evaluate.stride null → 8" in overlap and overlap.count("≠ stride") == 2
    assert "first figures" in built
    assert len(texts(opened, "#yardsticks tbody tr")) == 3


def test_header_sorts_by_mouse_and_keyboard(opened):
    figures = lambda: [float(text.replace(",", "")) for text in texts(opened, "#runs [data-figure=ppl]")]  # noqa: E731
    header = opened.find_elements("css selector", "#runs th")[2]
    header.find_element("css selector", "button").click()
    assert figures() == sorted(figures()) and header.get_attribute("aria-sort") == "ascending"
    header.find_element("css selector", "button").send_keys("\n")
    assert figures() == sorted(figures(), reverse=True) and header.get_attribute("aria-sort") == "descending"
    assert len(opened.find_elements("css selector", "#runs th[aria-sort]")) == 1


def test_selected_runs_are_drawn_and_compared(opened):
    select(opened, 1, 3)
    wait(opened, lambda: lines_drawn(opened, "curves") == 4)  # training and validation of two
    assert not opened.find_element("id", "warning").is_displayed()
    assert len(texts(opened, "#samples th")) == 2
    assert any("n_embd" in row and "16" in row and "32" in row for row in texts(opened, "#compare tbody tr"))
    drawn = "return document.querySelector('#curves svg').outerHTML"
    before = opened.execute_script(drawn)
    select(opened, 1)
    wait(opened, lambda: lines_drawn(opened, "curves") == 2)
    assert opened.execute_script(drawn) != before
    # Another tokenizer: the page says so, and draws bits per byte of validation alone.
    select(opened, 0, 1)
    warning = texts(opened, "#warning")[0]
    assert "differ in tokenizer" in warning and "compare bits per byte" in warning
    assert "bits per byte" in texts(opened, "#curves-title")[0]
    wait(opened, lambda: lines_drawn(opened, "curves") == 2)
    # Another stride: neither figure compares.
    select(opened, 2, 3)
    assert "bits per byte can't be compared either" in texts(opened, "#warning")[0]
    select(opened)
    assert opened.find_element("id", "none").is_displayed()


def test_lines_over_time_break_where_ppl_cannot_be_compared(opened):
    assert lines_drawn(opened, "ppl") == 1  # built and width; the newest has another tokenizer
    points = "return document.querySelectorAll(`#${arguments[0]} .mark-symbol path`).length"
    assert opened.execute_script(points, "ppl") >= 4
    path = "return document.querySelector(`#${arguments[0]} .mark-line path`).getAttribute('d').split('L').length"
    assert opened.execute_script(path, "ppl") == 2 and opened.execute_script(path, "bits") == 3


def test_page_is_safe_offline_and_quiet(opened):
    select(opened, 0, 1)
    assert opened.execute_script("return window.hacked") is None
    assert any(HOSTILE in text for text in texts(opened, "#samples td"))
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
        box = opened.execute_script(
            "const box = document.querySelector('#runs').parentElement; return [box.scrollWidth, box.clientWidth]"
        )
        assert box[0] > box[1]
        assert light() > 600
        wait(opened, lambda: opened.execute_script(label))
        before = opened.execute_script(label)
        media("dark")
        wait(opened, lambda: light() < 150 and opened.execute_script(label) not in (None, before))
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_uncommitted_figures_are_the_first_row(lived, tmp_path, monkeypatch):
    project = tmp_path / "project"
    run("git", "clone", "-q", str(lived), str(project), cwd=tmp_path)
    figures = json.loads((project / report.EVAL).read_text())
    figures["test"].update(ppl=900.0, bits_per_byte=2.0)
    (project / report.EVAL).write_text(json.dumps(figures))
    found = rows(project, monkeypatch)
    assert found.iloc[0]["place"] == "workspace" and found.iloc[0]["parent"] == head(project)
    # Nothing recorded these figures yet, so what made them isn't known.
    assert found.iloc[0]["unknown"] == "dvc.lock records other figures"
    (project / "dvc.lock").write_text(lock_of(project).replace(hash_of(project, report.EVAL), md5(json.dumps(figures))))
    found = rows(project, monkeypatch)
    assert found.iloc[0]["bits_change"] == -0.25 and found.iloc[0]["known"]


def test_every_yardstick_is_seen(project, monkeypatch):
    text = hash_of(project, "data/test.txt")
    commit(project, "other text", 10.0, 1.0, lock=[(text, "1" * 32)])
    commit(project, "lines", 11.0, 1.1, lock=[("document: blank_line", "document: line")])
    commit(project, "stride", 12.0, 1.2, lock=[("stride:\n", "stride: 4\n")])
    commit(project, "whole stride", 13.0, 1.3, lock=[("stride: 4\n", "stride: 16\n")])
    found = rows(project, monkeypatch)[::-1]
    both = [(row.ppl_differs, row.bits_differs) for row in found.itertuples()][1:]
    assert both == [([words], [words]) for words in ("test text", "data.document", "stride", "stride")]
    # A stride of block_size overlaps nothing, as null does.
    assert list(found["letter"]) == ["A", "B", "C", "D", "C"]
    assert [change["what"] for change in found.iloc[1]["changes"]] == ["data/test.txt"]


def test_bits_of_a_tokenizer_that_loses_something_are_marked(project, monkeypatch):
    figures = json.loads((project / "metrics/tokens.json").read_text())
    figures["test"]["changed_documents"] = 3
    other = [(hash_of(project, "models/tokenizer"), "ab" * 16)]
    commit(project, "lossy", 10.0, 1.0, lock=other)
    (project / "metrics/tokens.json").write_text(json.dumps(figures))
    commit(project, "same tokenizer", 9.0, 0.9)
    commit(project, "said", 8.0, 0.8)
    found = rows(project, monkeypatch)[::-1]
    assert list(found["inexact"]) == [False, False, True, True]
    assert list(found["bits_differs"])[1:] == [[], [], []]  # neither says so, or the tokenizer is one
    commit(project, "exact again", 11.0, 1.2, lock=[("ab" * 16, other[0][0])])
    figures["test"]["changed_documents"] = 0
    (project / "metrics/tokens.json").write_text(json.dumps(figures))
    commit(project, "exact again, said", 11.1, 1.3)
    found = rows(project, monkeypatch)
    assert found.iloc[1]["bits_differs"] == ["what the tokenizer loses"]
    text = report.page(found)
    assert "bits not exact" in text
    assert "Best bits per byte" in text and "<b>0.800</b>" not in text


def test_odd_histories(project, monkeypatch, tmp_path):
    first = head(project)
    run("git", "checkout", "-q", "-b", "side", cwd=project)
    side = commit(project, "side", 30.0, 3.0, lock=[("n_layer: 2\n", "n_layer: 3\n          n_wing: 1\n")])
    run("git", "checkout", "-q", "main", cwd=project)
    main = commit(project, "main", 20.0, 2.0, lock=[("dropout: 0.0", "dropout_rate: 0.0")])
    run("git", "merge", "-q", "--no-commit", "-s", "ours", "side", cwd=project, check=False)
    merged = commit(project, "merged", 10.0, 1.0)
    (project / "dvc.lock").unlink()
    (project / report.EVAL).write_text('{"test": {"ppl": NaN}}')
    run("git", "rm", "-q", "metrics/samples.md", "metrics/valid.csv", cwd=project)
    bare = commit(project, "no lock, a figure that is none")
    (project / report.EVAL).unlink()
    commit(project, "no figures")

    found = rows(project, monkeypatch)
    assert list(found.index[:2]) == [bare, merged] and set(found.index) == {bare, merged, main, side, first}
    assert found.loc[merged, "merge"] and found.loc[merged, "parent"] == main
    assert found.loc[main, "changes"] == [
        {"what": "model.dropout", "old": "0.0", "new": None},
        {"what": "model.dropout_rate", "old": None, "new": "0.0"},
    ]
    assert {change["what"] for change in found.loc[side, "changes"]} == {"model.n_layer", "model.n_wing"}
    assert found.loc[bare, "unknown"] == "no dvc.lock" and found.loc[bare, "letter"] == "?"
    assert "unknown: no dvc.lock" in report.page(found)

    run("git", "checkout", "-q", "--detach", side, cwd=project)
    found = rows(project, monkeypatch)
    assert found.loc[side, "place"] == "here" and found.loc[main, "place"] == "elsewhere"

    shallow = tmp_path / "shallow"
    run("git", "clone", "-q", "--depth", "1", "-b", "side", project.as_uri(), str(shallow), cwd=tmp_path)
    found = rows(shallow, monkeypatch)
    assert list(found.index) == [side] and found.iloc[0]["cut"]
    assert "git fetch --unshallow" in report.page(found)


def test_hundreds_of_commits(project, monkeypatch):
    lock, figures = lock_of(project), json.loads((project / report.EVAL).read_text())
    recorded = hash_of(project, report.EVAL)
    stream = []
    for i in range(300):
        figures["test"]["ppl"] = 100 - i / 10
        raw = json.dumps(figures)
        files = {
            report.EVAL: raw,
            "dvc.lock": lock.replace(recorded, md5(raw)).replace("lr: 0.004", f"lr: {i + 1}e-05"),
        }
        files["metrics/train.csv"] = f"step,tokens,train_loss\n1,64,{i}\n2,128,1\n"
        stream.append(f"commit refs/heads/main\ncommitter T <t@example.com> {2_000_000_000 + i} +0000\ndata 1\nc\n")
        stream.append("from refs/heads/main^0\n" if i == 0 else "")
        stream += [f"M 644 inline {name}\ndata {len(text)}\n{text}\n" for name, text in files.items()]
    subprocess.run(["git", "fast-import", "--quiet"], input="".join(stream), cwd=project, check=True, text=True)
    run("git", "reset", "-q", "--hard", cwd=project)
    found = rows(project, monkeypatch)
    page = report.page(found)
    assert len(found) == 301 and len(page) < 4e6
    assert (found["ppl_change"].iloc[:299] == -0.1).all()


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
