"""Ten seeds of the same small settings through the real stages: how often a verdict tells two of them apart.

    python tests/seeds.py

Nothing but the seed differs, so better and worse should be rare. A pair's training noise is that of the eight others.
"""

import sys
import tempfile
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.runs import FILES, Run, read
from tools.verdict import UNSURE, judge, pooled

from conftest import run_stage, sample_lines, small_project

SEEDS = 10


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        project = small_project(Path(name))
        (project / "data/test.txt").write_text(sample_lines(9000, 720))  # 60 documents
        for stage in ("prepare_corpus", "train_tokenizer", "tokenize_blocks"):
            assert run_stage(project, stage)[0] == 0
        runs = [trained(project, seed) for seed in range(SEEDS)]

    def told_apart(pairs) -> int:
        count = 0
        for a, b in pairs:
            others = [run for run in runs if run not in (a, b)]
            count += judge([a], [b], "test", pooled([others], "test", "the others"))["verdict"] != UNSURE
        return count

    bits = [run.number("test", "bits_per_byte") for run in runs]
    print(f"bits per byte: {min(bits):.4f} to {max(bits):.4f}")
    apart = list(zip(runs[::2], runs[1::2]))
    print(f"better or worse: {told_apart(apart)} of {len(apart)} pairs that share no run")
    print(f"better or worse: {told_apart(combinations(runs, 2))} of all {SEEDS * (SEEDS - 1) // 2} pairs")


def trained(project: Path, seed: int) -> Run:
    for stage in ("train", "evaluate"):
        status, _, err = run_stage(
            project, stage, f"--seed_everything={seed}", "--trainer.max_epochs=1", "--optimizer.batch_size=32"
        )
        assert status == 0, err
    run = Run(f"seed {seed}", None, "here", f"seed {seed}")
    files = {name: (project / path).read_bytes() for name, path in FILES.items() if name != "lock"}
    assert read(run, files | {"lock": None})
    return run


if __name__ == "__main__":
    main()
