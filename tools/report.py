"""Writes report.html: every commit and experiment that changed a figure, in one page that needs no network.

Each run is compared with the nearest earlier one by tools/verdict.py. Runs on the sample text are left
out of a project that has other text; --all shows them, --since REV only what came after a revision.
It reads Git and DVC's files in it, and changes nothing.
"""

import base64
import hashlib
import io
import json
import math
import re
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

from stages.common.commands import CommandLine
from stages.common.errors import UserError
from stages.common.errors import run as run_main
from stages.common.files import write_text
from tools.runs import EVAL, SAMPLE_TEXT, Run, exists, history, number, read_columns, read_json
from tools.verdict import compare, seed_groups

import numpy as np
from jinja2 import Environment, FileSystemLoader

TRAIN, VALID, SAMPLES, CORPUS = "metrics/train.csv", "metrics/valid.csv", "metrics/samples.md", "metrics/corpus.json"
CURVE_POINTS = 200  # a curve on a screen shows no more
LABEL_LETTERS, SETTING_LETTERS = 22, 80
FLOPS = 6  # of a training step, a parameter and token: Kaplan et al. 2020, section 2.1
HERE = Path(__file__).parent
BUNDLE = "import vl_convert; print(vl_convert.javascript_bundle())"  # Vega
FIGURES = ("ppl", "ppl_low", "ppl_high", "bits_per_byte")


def curve(column: str, raw: bytes | None) -> str:
    """JSON of the points (tokens seen, loss in nats a token), neighbours averaged down to CURVE_POINTS."""
    table = read_columns(raw, "tokens", column)
    table = table[np.isfinite(table).all(axis=1)]
    if len(table) > CURVE_POINTS:
        table = np.stack([part.mean(axis=0) for part in np.array_split(table, CURVE_POINTS)])
    return json.dumps([[round(tokens), round(loss, 4)] for tokens, loss in table.tolist()])


def read_samples(raw: bytes | None) -> str:
    """JSON of the pairs (prompt, text) of metrics/samples.md."""
    text = (raw or b"").decode(errors="replace")
    parts = re.split(r"^Prompt: (.*)$", text, flags=re.MULTILINE)[1:]
    pairs = zip(parts[::2], parts[1::2])
    return json.dumps(
        [[str(read_json(prompt.encode()) or prompt), textwrap.dedent(text).strip("\n")] for prompt, text in pairs]
    )


# What the page shows beside the figures, as it is kept of each run.
MORE = {
    TRAIN: partial(curve, "train_loss"),
    VALID: partial(curve, "valid_loss"),
    SAMPLES: read_samples,
    CORPUS: lambda raw: Run.part(Run.part(read_json(raw), "leakage"), "test"),
}


def main() -> None:
    command = CommandLine("tools.report", __doc__)
    command.add_argument("--output", type=Path, default=Path("report.html"), help="HTML file to write")
    command.add_argument("--since", metavar="REV", help="only what came after this revision, and its own run")
    command.add_argument("--all", action="store_true", help="runs on the sample text too")
    options = command.parse_args()
    if options.output.is_dir():
        raise UserError(f"--output: {options.output} is a folder: name an HTML file")
    if options.since and not exists(options.since):
        raise UserError(f"--since: {options.since}: no such revision")
    bundle = subprocess.Popen([sys.executable, "-c", BUNDLE], stdout=subprocess.PIPE)  # seconds, meanwhile
    try:
        runs = history(MORE, since=options.since)
        if not runs:
            raise UserError(
                f"no figures yet: no commit has {EVAL}: run `dvc repro`, then `git add -A` and `git commit`"
            )
        shown = runs if options.all or options.since else own_runs(runs)
        write_text(options.output, page(described(shown), bundle.communicate()[0].decode()))
    finally:
        bundle.kill()
    hidden = f" ({len(runs) - len(shown)} on the sample text left out: --all)" if len(runs) > len(shown) else ""
    size = options.output.stat().st_size / 1e6
    print(f"{options.output.resolve()}: {len(shown)} runs{hidden}, {size:.1f} MB: open it in a browser")


def own_runs(runs: list[Run]) -> list[Run]:
    """Without the template's own history: runs on the sample text, where the newest is on another."""
    samples = [str(run.params.get("data.train_file", SAMPLE_TEXT)).startswith(SAMPLE_TEXT) for run in runs]
    return runs if samples[0] else [run for run, sample in zip(runs, samples) if not sample]


def described(runs: list[Run]) -> list[dict[str, Any]]:
    """What the page shows of each run: its figures, its verdict against its parent, and what made it differ.

    Returns:
        for each run: run; ppl, bits, low, high of the test set; verdicts against the parent (of each test set by
        name, test first; empty without one); letter (ppl compares where it is the same) and bits_letter; changes;
        seeds (all runs of its recipe), leader (it is the newest of them), mean and sd of their bits; cost; leakage.
    """
    parents, groups = {run.revision: run for run in runs}, seed_groups(runs)
    letters, bits_letters = {}, {}
    rows = []
    for run in reversed(runs):
        scored = run.detail("test", "text"), run.stride("test")
        known = scored[0] is not None
        lossy = run.detail("test", "tokenizer") if run.detail("test", "changed_documents") else None
        letter = name_of(letters, (*scored, run.detail("test", "tokenizer"))) if known else "?"
        bits_letter = name_of(bits_letters, (*scored, lossy)) if known else "?"
        parent, seeds = parents.get(run.parent), groups[run.recipe]
        names = [name for name in run.figures if name != "valid"]
        verdicts = compare(parent, run, groups, names)["sets"] if parent else {}
        bits = [each.number("test", "bits_per_byte") for each in seeds]
        rows.append(
            {
                "run": run,
                "ppl": run.number("test", "ppl"),
                "bits": run.number("test", "bits_per_byte"),
                "low": run.number("test", "ppl_low"),
                "high": run.number("test", "ppl_high"),
                "letter": letter,
                "bits_letter": bits_letter,
                "lossy": lossy is not None,
                "has_parent": parent is not None,
                "verdicts": {name: verdict | {"bar": bar(verdict)} for name, verdict in verdicts.items()},
                "changes": changes(run, parent) if parent and not (run.unknown or parent.unknown) else [],
                "unknown": run.unknown or (parent.unknown if parent else None),
                "seeds": seeds,
                "leader": seeds[0] is run,
                "mean": float(np.mean(bits)),
                "sd": float(np.std(bits, ddof=1)) if len(bits) > 1 else math.nan,
                **cost(run),
                "leakage": leakage(run),
            }
        )
    return rows[::-1]


def name_of(letters: dict[tuple, str], key: tuple) -> str:
    i = len(letters)
    return letters.setdefault(key, f"{chr(ord('A') + i % 26)}{i // 26 or ''}")


def cost(run: Run) -> dict[str, float]:
    """What the training took: parameters, tokens seen, seconds, tokens a second, floating-point operations."""
    found = {key: number(run.timing, key) for key in ("parameters", "tokens", "train_seconds", "tokens_per_second")}
    return found | {"compute": FLOPS * found["parameters"] * found["tokens"]}


def leakage(run: Run) -> float:
    """The larger share of the test documents and of their n-grams that stand word for word in train."""
    return float(np.fmax(number(run.more[CORPUS], "documents"), number(run.more[CORPUS], "ngrams")))


def bar(verdict: dict) -> dict[str, float] | None:
    """Where the interval and its middle stand in a bar with 0 in the middle, in percent of its width."""
    bits = verdict["bits_per_byte"]
    if not bits or not math.isfinite(bits["low"]):
        return None
    low, high = bits["with_seeds"] or (bits["low"], bits["high"])
    edge = max(abs(low), abs(high), 1e-12) * 1.1
    left, right, middle = (50 + 50 * value / edge for value in (low, high, bits["difference"]))
    return {"left": left, "width": right - left, "middle": middle}


def changes(run: Run, parent: Run) -> list[dict[str, str]]:
    """What differs from the parent: settings, old and new, then text and code that no stage made."""
    found = []
    before, after = parent.params, run.params
    for key in sorted({*before, *after}):
        if (key in before, before.get(key)) != (key in after, after.get(key)):
            found.append({"what": key, "old": shown(before, key), "new": shown(after, key)})
    for path in sorted({*run.sources, *parent.sources}):
        old, new = parent.sources.get(path), run.sources.get(path)
        if old != new:
            how = "added" if old is None else "removed" if new is None else "edited"
            found.append({"what": path, "how": how})
    return found


def shown(params: dict[str, Any], key: str) -> str | None:
    if key not in params:
        return None
    value = params[key]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split()) or "(empty)"
    return text if len(text) <= SETTING_LETTERS else f"{text[:SETTING_LETTERS]} …"


def page(rows: list[dict[str, Any]], libraries: str) -> str:
    """The HTML of `described` runs, with its scripts, styles and data inside, and what BUNDLE prints."""
    libraries = libraries.replace("</script", "<\\/script")
    script = (HERE / "report.js").read_text(encoding="utf-8")
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    best = {}  # of each bits_letter, by the mean over seeds
    for row in rows:
        if row["letter"] != "?" and not math.isnan(row["bits"]) and row["leader"]:
            best[row["bits_letter"]] = min(best.get(row["bits_letter"], row), row, key=lambda row: row["mean"])
    yardsticks = {row["letter"]: row for row in rows if row["letter"] != "?"}
    text = io.StringIO()
    parts = environment.get_template("report.html").generate(
        project=Path.cwd().name,
        rows=rows,
        newest=rows[0],
        best=best.get(rows[0]["bits_letter"]),
        bests=best,
        yardsticks=[yardsticks[letter] for letter in sorted(yardsticks, key=lambda letter: (len(letter), letter))],
        cut=any(row["run"].cut for row in rows),
        data=page_data(rows),
        libraries=libraries,
        script=script,
        hashes=[csp_hash(source) for source in (libraries, script)],
        figure=figure,
        duration=duration,
        count=count,
    )
    text.writelines(parts)  # render() would hold all of a million parts
    return text.getvalue()


def page_data(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page's script draws; equal curves and samples are there once, as JSON."""
    pools = {"curves": {}, "samples": {}}

    def pooled(pool: str, value: str) -> int:
        return pools[pool].setdefault(value, len(pools[pool]))

    settings = [{key: shown(row["run"].params, key) for key in row["run"].params} for row in rows]
    shared = set.intersection(*(set(texts.items()) for texts in settings))
    labels, segments, before, found = set(), {"ppl": 0, "bits": 0}, None, []
    for row, texts in list(zip(rows, settings))[::-1]:
        run = row["run"]
        if run.place == "here":  # the line of the plots breaks where two can't be compared
            for name, letter in (("ppl", "letter"), ("bits", "bits_letter")):
                segments[name] += bool(before and (before[letter] != row[letter] or row[letter] == "?"))
            before = row
        label = textwrap.shorten(run.name, LABEL_LETTERS, placeholder="…") or run.short
        label = label if label not in labels else f"{label} {run.short}"
        labels.add(label)
        valid = [run.number("valid", key) for key in ("bits_per_byte", "loss")]
        figures = {f"{name}_{key}": run.number(name, key) for name in run.figures for key in FIGURES}
        figures |= {key: row[key] for key in ("parameters", "tokens", "train_seconds", "compute")}
        # Turns the validation loss of a training curve into bits per byte.
        figures |= {"bits_factor": valid[0] / valid[1] if valid[1] else math.nan, "leakage": row["leakage"]}
        found.append(
            {
                "id": run.short,
                "axis": label,
                "name": run.name,
                "place": run.place,
                "when": run.when,
                "figures": {
                    key: float(f"{value:.7g}") if math.isfinite(value) else None for key, value in figures.items()
                },
                "letter": row["letter"],
                "bits_letter": row["bits_letter"],
                "segment": dict(segments),
                "tokenizer": run.detail("test", "tokenizer"),
                "params": {key: value for key, value in texts.items() if (key, value) not in shared},
                "curves": pooled("curves", f"[{run.more[TRAIN]}, {run.more[VALID]}]"),
                "samples": pooled("samples", run.more[SAMPLES]),
            }
        )
    parent = [i for i, row in enumerate(rows) if row["run"].revision == rows[0]["run"].parent]
    sets = dict.fromkeys(name for row in rows for name in row["run"].figures if name != "valid")
    return {
        "runs": found[::-1],
        "sets": [*sets, "valid"],
        "selected": parent + [0],
        **{name: list(pool) for name, pool in pools.items()},
    }


def figure(value: float, digits: int, sign: str = "") -> str:
    """A number as people read it; a minus sign as wide as the plus."""
    return f"{value:{sign},.{digits}f}".replace("-", "−") if math.isfinite(value) else "–"


def count(value: float) -> str:
    """A large number in three digits."""
    for size, unit in ((1e18, " E"), (1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return figure(value, 0)


def duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "–"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def csp_hash(source: str) -> str:
    return base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


if __name__ == "__main__":
    run_main(main)
