"""The benchmarks' machinery: what fails is said in one line, and the others are measured."""

from benchmarks.turns import Contender, interleave

import pytest

WORKS = """
from benchmarks.turns import Turns
turns = Turns()
while True:
    turns.next_step()
"""


def test_a_contender_that_fails_is_named_and_left_out(tmp_path):
    (tmp_path / "works.py").write_text(WORKS)
    (tmp_path / "fails.py").write_text("import a_package_that_is_missing")
    contenders = [Contender(name, name, cwd=tmp_path) for name in ("works", "fails")]
    rates, note = interleave(contenders, rounds=1, seconds=0.01)
    assert rates.keys() == {"works"}
    said = "fails failed with status 1: ModuleNotFoundError: No module named 'a_package_that_is_missing'"
    assert note.split("\n\n")[1:] == [f"Left out: {said}"]


def test_nothing_is_measured_without_the_first(tmp_path):
    (tmp_path / "fails.py").write_text("raise SystemExit('error: no text')")
    with pytest.raises(SystemExit, match="^error: fails failed with status 1: error: no text$"):
        interleave([Contender("fails", "fails", cwd=tmp_path)], rounds=1, seconds=0.01)
