"""Says whether a run is better than another, and how sure that is.

python -m tools.compare                   the workspace against the run before it
python -m tools.compare main              the workspace against main's
python -m tools.compare HEAD~1 my-exp     the experiment against a commit
python -m tools.compare --noise           how much the seed alone changes the workspace's figures

Nothing is run again: it reads metrics/documents.csv, details.json and eval.json in Git. The difference is
B - A, so below 0 is better. Its 95 % interval is over the documents of the test text, and over seeds
where runs of the same settings, text and code under several are there. Exit status 0 whatever the verdict.
"""

import json
import math
import sys
from typing import Any

from stages.common.commands import CommandLine
from stages.common.errors import UserError, run
from tools.runs import WORKSPACE, Run, find, history, revisions_of
from tools.verdict import WORSE, compare, pooled, seed_groups


def main() -> None:
    command = CommandLine("tools.compare", __doc__)
    command.add_argument("a", nargs="?", metavar="A", help="revision or experiment (default: the run before B)")
    command.add_argument("b", nargs="?", metavar="B", default=WORKSPACE, help="the same (default: the workspace)")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--noise", action="store_true", help="print the mean and spread over A's seeds instead")
    command.add_argument("--fail-if-worse", action="store_true", help="exit status 1 when a test set got worse")
    options = command.parse_args()
    names = [name for name in (options.a, options.b) if name]
    runs = history(revisions=revisions_of(names))
    groups = seed_groups(runs)
    if options.noise:
        print(noise_text(find(options.a or WORKSPACE, runs), groups, options.json))
        return
    b = find(options.b, runs)
    if not (options.a or b.parent):
        raise UserError(f"{b.label}: no run before it: name one to compare with")
    a = find(options.a or b.parent, runs)
    verdict = compare(a, b, groups)
    print(json.dumps(finite(verdict), indent=2) if options.json else text(verdict, a, b))
    worse = [name for name, found in verdict["sets"].items() if found["verdict"] == WORSE and name != "valid"]
    if options.fail_if_worse and worse:
        sys.exit(1)


def text(verdict: dict, a: Run, b: Run) -> str:
    """The verdict as people read it, the sets in their order and valid last."""
    lines = [f"A: {a.label}  {a.name}  seeds {listed(verdict['seeds']['a'])}"]
    lines += [f"B: {b.label}  {b.name}  seeds {listed(verdict['seeds']['b'])}"]
    for name, found in verdict["sets"].items():
        lines += ["", f"{name}: {found['verdict'].upper()}: {found['why']}"]
        if not found["exact"]:
            lines.append("  the tokenizer changes the text: bits per byte is not exact")
        for key, words, digits in (("bits_per_byte", "bits per byte", 4), ("ppl", "ppl", 3)):
            row = found[key]
            if row is None:
                continue
            shown = f"  {words:14}{row['a']:.{digits}f} → {row['b']:.{digits}f}   {row['difference']:+.{digits}f}"
            shown += f"   documents [{row['low']:+.{digits}f}, {row['high']:+.{digits}f}]"
            if row["with_seeds"]:
                shown += "   with seeds [{:+.{d}f}, {:+.{d}f}]".format(*row["with_seeds"], d=digits)
            lines.append(shown)
    return "\n".join(lines)


def listed(seeds: list) -> str:
    return ", ".join(map(str, sorted(seeds)))


def finite(tree: Any) -> Any:
    """JSON has no infinity: null where one document gives no interval."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def noise_text(run: Run, groups: dict[str, list[Run]], as_json: bool) -> str:
    group = groups[run.recipe]
    if len(group) < 2:
        raise UserError(f"{run.label}: one seed only ({run.seed}): `make seeds N=3` makes more")
    rows = {}
    for name in run.figures:
        values = [each.number(name, "bits_per_byte") for each in group]
        noise = pooled([group], name, "")
        if noise is None:
            raise UserError(f"{run.label}: a seed has no bits per byte of {name}: run `dvc repro` there")
        floor = noise.half_width(1, 1)
        rows[name] = {"mean": sum(values) / len(values), "sd": noise.sd, "floor": floor, "values": values}
    if as_json:
        return json.dumps({"run": run.label, "seeds": [each.seed for each in group], "bits_per_byte": rows}, indent=2)
    lines = [f"{run.label}: {len(group)} seeds ({listed([each.seed for each in group])}), bits per byte"]
    for name, row in rows.items():
        lines.append(
            f"  {name}: {row['mean']:.4f} ± {row['sd']:.4f} (mean ± standard deviation); "
            f"one run against one: a difference below {row['floor']:.4f} is noise"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
