"""tests/mutations.py: a fault is noticed, and a change that does nothing is not."""

import shutil
from pathlib import Path

import mutations
from conftest import ROOT, run

# Without quick tests: the sample's hash stands in dvc.lock, and the plots are drawn by DVC.
LEFT_OUT = {"stages/sample_corpus", "stages/common/paths", "tools/offline_plots"}
TEST = ["tests/text/test_token_definitions.py::test_vocabulary_size_is_the_highest_id_and_one"]


def try_two(template: Path, folder: Path) -> None:
    checkout = shutil.copytree(template, folder / "checkout")
    trial = mutations.Trial(folder, checkout, checkout, checkout)
    file, line = "stages/text/tokenizers.py", "        return max(self.vocab.values()) + 1"
    source = (template / file).read_text()
    number = source.split("\n").index(line) + 1
    fault = mutations.Fault(file, number, line, line.replace("+ 1", "- 1"))
    assert fault in list(mutations.faults(file, source, "1"))
    assert trial.noticed(fault, [], TEST, 60) == TEST[0]
    same = mutations.Fault(file, number, line, "        return 1 + max(self.vocab.values())")
    assert trial.noticed(same, [], TEST, 60) == ""
    assert (checkout / file).read_text() == source


def test_a_fault_is_noticed_and_another_way_to_write_the_same_is_not(template, tmp_path):
    """In a process of its own, as the command is: what other tests have left in this one would be forked too."""
    command = f"import test_mutations as t; t.try_two(t.Path({str(template)!r}), t.Path({str(tmp_path)!r}))"
    run("python", "-c", command, cwd=ROOT, env={"PYTHONPATH": f"{ROOT}:{ROOT}/tests:{ROOT}/tests/project"})


def test_every_file_has_its_tests():
    tried = {f"{room}/{file}" for room, (_, files) in mutations.ROOMS.items() for file in files}
    files = {str(file.relative_to(ROOT))[:-3] for room in mutations.ROOMS for file in (ROOT / room).glob("[!_]*.py")}
    assert tried | LEFT_OUT == files and not tried & LEFT_OUT
    for _, tests in mutations.ROOMS.values():
        paths = [mutations.path_of(name).split("::")[0] for names in tests.values() for name in names.split()]
        assert all((ROOT / path).exists() for path in paths)
