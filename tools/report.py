"""Writes report.html: every commit and experiment that changed a figure, in one page that needs no network.

It reads Git and DVC's files in it, and changes nothing. A figure is compared with the nearest
earlier commit that had one. ppl compares only between runs that scored the same test text, split
into the same documents, with the same stride and the same tokenizer; bits per byte needs all of
these but the tokenizer.
"""

import base64
import hashlib
import io
import json
import math
import re
import subprocess
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

from stages.common.commands import CommandLine
from stages.common.errors import UserError, run
from stages.common.files import write_text

import numpy as np
import pandas as pd
import vl_convert
import yaml
from jinja2 import Environment, FileSystemLoader

EVAL = "metrics/eval.json"
FILES = (
    EVAL,
    "dvc.lock",
    "params.yaml",
    "metrics/run.json",
    "metrics/tokens.json",
    "metrics/train.csv",
    "metrics/valid.csv",
    "metrics/samples.md",
)
TOKENIZER = "models/tokenizer"
WORKSPACE = "workspace"
EXPERIMENT = re.compile(r"refs/exps/[0-9a-f]{2}/[0-9a-f]{38}/(.+)")
CURVE_POINTS = 200  # a curve on a screen shows no more
HERE = Path(__file__).parent
FIGURES = ("test_ppl", "test_bits_per_byte", "valid_ppl", "valid_bits_per_byte", "bits_factor", "seconds")

# What must be the same for two figures to be comparable, in the reader's words.
PPL_NEEDS = {"tokenizer": "tokenizer", "text": "test text", "document": "data.document", "stride": "stride"}
BITS_NEEDS = {key: words for key, words in PPL_NEEDS.items() if key != "tokenizer"}


def main() -> None:
    command = CommandLine("tools.report", __doc__)
    command.add_argument("--output", type=Path, default=Path("report.html"), help="HTML file to write")
    output = command.parse_args().output
    if output.is_dir():
        raise UserError(f"--output: {output} is a folder: name an HTML file")
    runs = history()
    if runs.empty:
        raise UserError(f"no figures yet: no commit has {EVAL}: run `dvc repro`, then `git add -A` and `git commit`")
    write_text(output, page(compared(runs)))
    print(f"{output.resolve()}: {len(runs)} runs, {output.stat().st_size / 1e6:.1f} MB: open it in a browser")


def git(*command: str, stdin: bytes | None = None) -> bytes:
    done = subprocess.run(["git", *command], input=stdin, capture_output=True)
    if done.returncode:
        why = done.stderr.decode(errors="replace").strip().split("\n")[0]
        raise UserError(f"git {command[0]}: {why}")
    return done.stdout


def lines(*command: str) -> list[str]:
    return git(*command).decode(errors="replace").splitlines()


def history() -> pd.DataFrame:
    """One row a run, newest first: the workspace if it has new figures, commits, experiments.

    Returns:
        DataFrame indexed by revision, with parent (the revision to compare with, or None), place
        (workspace, here, experiment or elsewhere), name, when, author and what `read_run` finds.
    Raises:
        UserError: this is no Git repository.
    """
    cut = lines("rev-parse", "--is-shallow-repository") == ["true"]
    born = subprocess.run(["git", "rev-parse", "--quiet", "--verify", "HEAD"], capture_output=True).returncode == 0
    experiments = {}
    for line in lines("for-each-ref", "--format=%(objectname) %(refname)", "refs/exps"):
        revision, name = line.split(" ", 1)
        if match := EXPERIMENT.fullmatch(name):
            experiments[revision] = match[1]

    rows = []
    here = lines("rev-list", "HEAD", "--", EVAL) if born else []
    if born:
        # --parents makes %P the nearest earlier commits that changed the file.
        fields = ("%H", "%P", "%cd", "%aN", "%s")
        shape = [
            "--no-show-signature",
            "--encoding=UTF-8",
            "--date=format:%Y-%m-%d %H:%M",
            f"--format={'%x00'.join(fields)}",
        ]
        what = ["HEAD", "--branches", "--stdin", "--", EVAL]
        log = git("log", "-z", "--date-order", "--parents", *shape, *what, stdin="\n".join(experiments).encode())
        parts = log.decode(errors="replace").removesuffix("\0").split("\0")
        for i in range(0, len(parts) - 1, len(fields)):
            revision, parents, when, author, subject = parts[i : i + len(fields)]
            parents = parents.split()
            experiment = experiments.get(revision)
            rows.append(
                {
                    "revision": revision,
                    "parent": parents[0] if parents else None,
                    "merge": len(parents) > 1,
                    "cut": cut and not parents,
                    "place": "here" if revision in here else "experiment" if experiment else "elsewhere",
                    "name": experiment or subject or "(no message)",
                    "when": when,
                    "author": author,
                }
            )
    files = read_files([row["revision"] for row in rows] + ["HEAD"] * born)
    at_head = files.pop() if born else {}
    workspace = {name: read_disk(name) for name in FILES}
    if workspace[EVAL] and workspace[EVAL] != at_head.get(EVAL):
        parent = here[0] if here else None
        new = {"revision": WORKSPACE, "parent": parent, "merge": False, "cut": False, "place": WORKSPACE}
        rows.insert(0, new | {"name": "not committed", "when": "", "author": ""})
        files.insert(0, workspace)
    # A commit that removed the file changed it too, but has nothing to show.
    rows = [row | read_run(found) for row, found in zip(rows, files, strict=True) if found[EVAL]]
    table = pd.DataFrame(rows, dtype=object)
    return table.astype(dict.fromkeys(FIGURES, float)).set_index("revision", drop=False) if rows else table


def read_files(revisions: list[str]) -> list[dict[str, bytes | None]]:
    """FILES of each revision, None where one is missing, all from one Git process."""
    names = [f"{revision}:./{file}" for revision in revisions for file in FILES]
    stream = io.BytesIO(git("cat-file", "--batch", stdin="".join(f"{name}\n" for name in names).encode()))
    contents = []
    for _ in names:
        header = stream.readline().split()
        contents.append(None if header[-1] == b"missing" else stream.read(int(header[-1])))
        if contents[-1] is not None:
            stream.read(1)
    return [dict(zip(FILES, contents[i : i + len(FILES)])) for i in range(0, len(contents), len(FILES))]


def read_disk(name: str) -> bytes | None:
    return Path(name).read_bytes() if Path(name).is_file() else None


def read_run(files: dict[str, bytes | None]) -> dict[str, Any]:
    """The figures of a run and what made them; what is missing or can't be read is None or empty."""
    figures, timing = read_json(files[EVAL]), read_json(files["metrics/run.json"])
    changed = number(read_json(files["metrics/tokens.json"]), "test", "changed_documents")
    made = read_lock(files["dvc.lock"], files["params.yaml"], files[EVAL])
    return {
        "test_ppl": number(figures, "test", "ppl"),
        "test_bits_per_byte": number(figures, "test", "bits_per_byte"),
        "valid_ppl": number(figures, "valid", "ppl"),
        "valid_bits_per_byte": number(figures, "valid", "bits_per_byte"),
        # Turns the validation loss of a training curve into bits per byte.
        "bits_factor": ratio(number(figures, "valid", "bits_per_byte"), number(figures, "valid", "loss")),
        "seconds": number(timing, "train_seconds"),
        # The tokenizer doesn't give the exact text back, so the model was not asked for all of it.
        "inexact": changed > 0,
        **made,
        "train": curve(files["metrics/train.csv"], "train_loss"),
        "valid": curve(files["metrics/valid.csv"], "valid_loss"),
        "samples": read_samples(files["metrics/samples.md"]),
    }


def read_json(raw: bytes | None) -> Any:
    try:
        return json.loads(raw or b"null")
    except ValueError:
        return None


def number(tree: Any, *keys: str) -> float:
    """A figure in a tree of figures; NaN when it isn't there or isn't a finite number."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return float(tree) if isinstance(tree, int | float) and math.isfinite(tree) else math.nan


def ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def read_lock(raw: bytes | None, settings: bytes | None, figures: bytes) -> dict[str, Any]:
    """Settings, sources and what was scored, from the dvc.lock and params.yaml beside the figures.

    Returns:
        unknown: why nothing is known, or None; params: values by dotted name; sources: md5 by path
        of what no stage made; tokenizer, text, document, stride: what figures must share.
    """
    nothing = {"params": {}, "sources": {}, **dict.fromkeys(PPL_NEEDS), "tokenizer_name": "", "text_name": ""}
    if raw is None:
        return nothing | {"unknown": "no dvc.lock"}
    try:
        stages = read_yaml(raw)["stages"].values()
        hashes, params, outs = {}, {}, set()
        for stage in stages:
            for entry in stage.get("deps", []) + stage.get("outs", []):
                hashes[entry["path"]] = entry.get("md5")
            outs.update(entry["path"] for entry in stage.get("outs", []))
            for file in stage.get("params", {}).values():
                flatten(file or {}, "", params)
    except (yaml.YAMLError, AttributeError, KeyError, TypeError):
        return nothing | {"unknown": "dvc.lock can't be read"}
    if hashes.get(EVAL) != hashlib.md5(figures, usedforsecurity=False).hexdigest():
        return nothing | {"unknown": "dvc.lock records other figures"}
    try:
        text = str(read_yaml(settings or b"")["data"]["test_file"])  # dvc.lock has its hash under this name
    except (yaml.YAMLError, KeyError, TypeError):
        text = None
    if not (hashes.get(text) and hashes.get(TOKENIZER)):
        return nothing | {"unknown": "dvc.lock lacks the test text or the tokenizer"}
    stride = params.get("evaluate.stride")
    algorithm = params.get("tokenizer.tokenizer_model") or params.get("tokenizer.algorithm")
    made = {path for path in hashes if any(path == out or path.startswith(f"{out}/") for out in outs)}
    return {
        "unknown": None,
        "params": params,
        "sources": {path: md5 for path, md5 in hashes.items() if path not in made},
        "tokenizer": hashes[TOKENIZER],
        "text": hashes[text],
        "document": params.get("data.document"),
        "stride": "block_size" if stride in (None, params.get("model.block_size")) else str(stride),
        "tokenizer_name": f"{algorithm} {params.get('tokenizer.vocab_size', '')}".strip(),
        "text_name": text,
    }


@cache
def read_yaml(raw: bytes) -> Any:
    return yaml.load(raw, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def flatten(tree: Any, prefix: str, into: dict[str, Any]) -> None:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flatten(value, f"{prefix}{key}.", into)
        else:
            into[f"{prefix}{key}"] = value


def curve(raw: bytes | None, column: str) -> list[list[float]]:
    """Points (tokens seen, loss in nats a token), neighbours averaged down to CURVE_POINTS."""
    try:
        table = pd.read_csv(io.BytesIO(raw or b""))[["tokens", column]].astype(float)
    except (ValueError, KeyError):
        return []
    table = table[np.isfinite(table).all(axis=1)]
    if len(table) > CURVE_POINTS:
        table = table.groupby(np.arange(len(table)) * CURVE_POINTS // len(table)).mean()
    points: Any = table.round({"tokens": 0, column: 4})
    return points.to_numpy().tolist()


def read_samples(raw: bytes | None) -> list[list[str]]:
    """Pairs (prompt, text) of metrics/samples.md."""
    text = (raw or b"").decode(errors="replace")
    parts = re.split(r"^Prompt: (.*)$", text, flags=re.MULTILINE)[1:]
    pairs = zip(parts[::2], parts[1::2])
    return [[str(read_json(prompt.encode()) or prompt), textwrap.dedent(text).strip("\n")] for prompt, text in pairs]


def compared(runs: pd.DataFrame) -> pd.DataFrame:
    """Adds the letter of what can be compared by ppl, and what differs from the parent.

    Returns:
        `history`'s DataFrame with letter, ppl, bits, and for each of the two its change against the
        parent and what keeps it from being compared (ppl_differs); has_parent; known, whether both
        have a dvc.lock to tell; changes, what made the figures differ.
    """
    runs = runs.assign(ppl=runs["test_ppl"], bits=runs["test_bits_per_byte"])
    parents = runs.reindex(runs["parent"]).set_axis(runs.index)
    order = runs[::-1].groupby(list(PPL_NEEDS), sort=False, dropna=False).ngroup()
    runs["letter"] = [letter(order[row.revision]) if row.unknown is None else "?" for row in runs.itertuples()]
    for name, needs, digits in (("ppl", PPL_NEEDS, 2), ("bits", BITS_NEEDS, 3)):
        runs[f"{name}_differs"] = [
            differences(row, parent, needs) for (_, row), (_, parent) in zip(runs.iterrows(), parents.iterrows())
        ]
        runs[f"{name}_change"] = (runs[name] - parents[name]).round(digits)
    runs["has_parent"] = parents["revision"].notna()
    runs["known"] = runs["unknown"].isna() & parents["unknown"].isna()
    runs["changes"] = [
        changes(row, parent) if row["has_parent"] and row["known"] else []
        for (_, row), (_, parent) in zip(runs.iterrows(), parents.iterrows())
    ]
    return runs


def differences(row: pd.Series, parent: pd.Series, needs: dict[str, str]) -> list[str]:
    """What keeps a figure from being compared with the parent's."""
    found = [words for key, words in needs.items() if row[key] != parent[key]]
    inexact = True in (row["inexact"], parent["inexact"])
    if inexact and "tokenizer" not in needs and row["tokenizer"] != parent["tokenizer"]:
        found.append("what the tokenizer loses")
    return found


def letter(i: int) -> str:
    return f"{chr(ord('A') + i % 26)}{i // 26 or ''}"


def changes(row: pd.Series, parent: pd.Series) -> list[dict[str, str]]:
    """What differs from the parent: settings, old and new, then text and code that no stage made."""
    found = []
    before, after = parent["params"], row["params"]
    for key in sorted({*before, *after}):
        if (key in before, before.get(key)) != (key in after, after.get(key)):
            found.append({"what": key, "old": shown(before, key), "new": shown(after, key)})
    for path in sorted({*row["sources"], *parent["sources"]}):
        old, new = parent["sources"].get(path), row["sources"].get(path)
        if old != new:
            how = "added" if old is None else "removed" if new is None else "edited"
            found.append({"what": path, "how": how})
    return found


def shown(params: dict[str, Any], key: str) -> str | None:
    if key not in params:
        return None
    value = params[key]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return textwrap.shorten(text, 80, placeholder=" …") or "(empty)"


def page(runs: pd.DataFrame) -> str:
    """The HTML of `compared` runs, with its scripts, styles and data inside."""
    libraries = vl_convert.javascript_bundle().replace("</script", "<\\/script")
    script = (HERE / "report.js").read_text(encoding="utf-8")
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    yardsticks = runs[runs["letter"] != "?"][::-1].drop_duplicates("letter")
    newest = runs.iloc[0]
    alike = runs[(runs["letter"] != "?") & (runs[list(BITS_NEEDS)] == newest[list(BITS_NEEDS)]).all(axis=1)]
    exact = ~alike["inexact"].astype(bool) & (not newest["inexact"])
    alike = alike[exact | (alike["tokenizer"] == newest["tokenizer"])]
    best = alike.loc[alike["bits"].idxmin()] if alike["bits"].count() > 1 else None
    return environment.get_template("report.html").render(
        project=Path.cwd().name,
        runs=[row for _, row in runs.iterrows()],
        newest=newest,
        best=best,
        yardsticks=[row for _, row in yardsticks.iterrows()],
        cut=bool(runs["cut"].any()),
        data=page_data(runs),
        libraries=libraries,
        script=script,
        hashes=[csp_hash(source) for source in (libraries, script)],
        figure=figure,
        duration=duration,
        short=short,
    )


def page_data(runs: pd.DataFrame) -> dict[str, Any]:
    """What the page's script draws; equal curves and samples are there once."""
    pools = {"curves": {}, "samples": {}}

    def pooled(pool: str, value: Any) -> int:
        return pools[pool].setdefault(json.dumps(value), len(pools[pool]))

    settings = [{key: shown(params, key) for key in params} for params in runs["params"]]
    shared = set.intersection(*(set(texts.items()) for texts in settings))
    rows = []
    for (_, row), texts in zip(runs.iterrows(), settings):
        rows.append(
            {
                "id": short(row["revision"]),
                "name": row["name"],
                "place": row["place"],
                "when": row["when"],
                "figures": {key: None if math.isnan(row[key]) else row[key] for key in FIGURES},
                "scored": {key: row[key] for key in PPL_NEEDS} if row["unknown"] is None else None,
                "letter": row["letter"],
                "params": {key: value for key, value in texts.items() if (key, value) not in shared},
                "curves": pooled("curves", {"train": row["train"], "valid": row["valid"]}),
                "samples": pooled("samples", row["samples"]),
            }
        )
    newest = runs.iloc[0]
    selected = [i for i, revision in enumerate(runs["revision"]) if revision == newest["parent"]] + [0]
    return {
        "runs": rows,
        "selected": selected,
        "needs": PPL_NEEDS,
        **{name: [json.loads(key) for key in pool] for name, pool in pools.items()},
    }


def short(revision: str) -> str:
    return revision if revision == WORKSPACE else revision[:7]


def figure(value: float, digits: int, sign: str = "") -> str:
    """A number as people read it; a minus sign as wide as the plus."""
    return "–" if math.isnan(value) else f"{value:{sign},.{digits}f}".replace("-", "−")


def duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "–"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def csp_hash(source: str) -> str:
    return base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


if __name__ == "__main__":
    run(main)
