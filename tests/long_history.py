"""What `python -m tools.report` takes for a long history, made on the spot of the committed figures, and a sort.

    python tests/long_history.py --commits 2000

Prints seconds, peak memory and the page's size, and with Chromium the seconds of a sort.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import ROOT, chromium, run

SORT = """
const done = arguments[arguments.length - 1], began = performance.now();
document.querySelectorAll("#runs th button")[2].click();
requestAnimationFrame(() => requestAnimationFrame(() => done((performance.now() - began) / 1000)));
"""


def long_history(project: Path, commits: int) -> None:
    """A repository whose every commit has other figures: learning rates, each under three seeds."""
    run("git", "init", "-q", "-b", "main", cwd=project)
    # Never all of it in memory: the report's peak is at least what this process has when it starts it.
    with subprocess.Popen(["git", "fast-import", "--quiet"], stdin=subprocess.PIPE, cwd=project) as process:
        process.stdin.writelines(f"{part}\n".encode() for part in commands(commits))
    assert process.returncode == 0
    run("git", "reset", "-q", "--hard", cwd=project)


def commands(commits: int) -> Iterator[str]:
    """What `git fast-import` reads."""
    random = np.random.default_rng(0)
    files = {f"metrics/{path.name}": path.read_text() for path in sorted((ROOT / "metrics").iterdir())}
    files["dvc.lock"] = (ROOT / "dvc.lock").read_text()
    documents, figures = pd.read_csv(ROOT / "metrics/documents.csv"), json.loads(files["metrics/eval.json"])
    for i in range(commits):
        yield f"commit refs/heads/main\ncommitter T <t@example.com> {1_700_000_000 + 600 * i} +0000\ndata 9\nRun {i:05}"
        factor = random.normal(1, 0.01) * random.normal(1, 0.005, len(documents))
        table = documents.assign(nll=documents.nll * factor)
        for name, row in figures.items():
            row["loss"] = (total := table[table.set == name][["nll", "tokens", "bytes"]].sum()).nll / total.tokens
            row["bits_per_byte"], row["ppl"] = total.nll / total.bytes / np.log(2), np.exp(row["loss"])
        files["metrics/documents.csv"] = table.to_csv(index=False)
        files["metrics/eval.json"] = json.dumps(figures)
        md5 = hashlib.md5(files["metrics/eval.json"].encode()).hexdigest()
        lock = re.sub(r"(path: metrics/eval\.json\n +hash: md5\n +md5: )\w+", rf"\g<1>{md5}", files["dvc.lock"])
        lock = re.sub(r"seed_everything: \d+", f"seed_everything: {i % 3}", lock)
        lock = re.sub(r"( lr: ).*", rf"\g<1>{0.001 + i // 3 * 1e-6:.6f}", lock)
        for name, text in (files | {"dvc.lock": lock}).items():
            yield f"M 644 inline {name}\ndata {len(text.encode())}\n{text}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/long_history.py", description=__doc__.split("\n")[0])
    parser.add_argument("--commits", type=int, default=2000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        long_history(Path(name), arguments.commits)
        began = time.monotonic()
        command = [sys.executable, "-m", "tools.report", "--all"]
        process = subprocess.Popen(command, cwd=name, env={**os.environ, "PYTHONPATH": str(ROOT)})
        _, status, used = os.wait4(process.pid, 0)
        assert status == 0
        size = Path(name, "report.html").stat().st_size / 1e6
        seconds, busy, peak = time.monotonic() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 1000
        print(f"{arguments.commits:,} commits: {seconds:.1f} s ({busy:.1f} of a processor), {peak:,.0f} MB")
        print(f"the page: {size:.1f} MB")
        with chromium() as driver:
            driver.get(Path(name, "report.html").as_uri())
            driver.execute_async_script(SORT)  # the first one waits for the plots
            print(f"a sort: {driver.execute_async_script(SORT):.2f} s")


if __name__ == "__main__":
    main()
