"""Whether a run is better than another, and how sure that is: the one place that compares runs.

Two models that score the same documents are compared document by document: the 95 % interval of their
difference is a paired bootstrap over documents (over runs of neighbours where documents.csv has groups).
It says whether another test text of the same kind would agree. It can't say whether another seed would:
that is what runs of the same settings, text and code under several seeds are for.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from stages.model.intervals import interval, perplexity
from tools.runs import Run, number

import numpy as np
from scipy import stats

BETTER, WORSE, UNSURE, INCOMPARABLE = "better", "worse", "can't tell", "can't be compared"
_, TOKENS, BYTES, _, NLL = range(5)  # columns of Run.documents
OF_THE_SAME_SIZE = 2.0  # a group whose parameters differ by no larger factor lends its noise
FEWEST_ROWS = 5
MOST = 1000


@dataclass
class Noise:
    """How much the seed alone changes bits per byte.

    Args:
        sd: standard deviation between seeds.
        degrees: of freedom of that estimate.
        source: where it was measured, in words.
    """

    sd: float
    degrees: int
    source: str

    def half_width(self, a: int, b: int) -> float:
        """Half the 95 % interval of the difference of two means over a and b seeds."""
        return float(stats.t.ppf(0.975, self.degrees)) * self.sd * math.sqrt(1 / a + 1 / b)


def compare(a: Run, b: Run, groups: dict[str, list[Run]], names: list[str] | None = None) -> dict[str, Any]:
    """The verdict on each set that both runs have: B against A.

    Args:
        groups: from `seed_groups`.
        names: the sets; None: all.
    Returns:
        a, b; sets: by name bits_per_byte and ppl (a, b, difference, low, high: the interval over documents;
        with_seeds: the interval over documents and seeds, or None), verdict, why, exact (the tokenizer gives the
        text back); seeds: what is known of the training noise. Figures are means over the seeds of each run's group.
    """
    names = [name for name in names or b.figures if name in a.figures and name in b.figures]
    only_seed = a.recipe == b.recipe
    sides = [[run] if only_seed else with_seeds(run, groups) for run in (a, b)]
    noises = {name: noise_of(a, b, name, groups) for name in names}
    sets = {name: judge(*sides, name, noises[name], only_seed) for name in names}
    seeds = {
        "a": [run.seed for run in sides[0]],
        "b": [run.seed for run in sides[1]],
        "noise": {name: noise and vars(noise) for name, noise in noises.items()},
    }
    return {"a": a.label, "b": b.label, "sets": sets, "seeds": seeds}


def judge(a: list[Run], b: list[Run], name: str, noise: Noise | None, only_seed: bool = False) -> dict[str, Any]:
    """The verdict on one set: the runs of B, seeds of one recipe, against those of A."""
    exact = not any(run.detail(name, "changed_documents") for run in (a[0], b[0]))
    if why := differing(a[0], b[0], name):
        return {"bits_per_byte": None, "ppl": None, "verdict": INCOMPARABLE, "why": "; ".join(why), "exact": exact}
    before = a[0].documents[name]
    nll = [np.mean([run.documents[name][:, NLL] for run in runs], axis=0) for runs in (a, b)]
    size = before[:, BYTES] * math.log(2)
    bits = row_of(*nll, size)
    one_tokenizer = a[0].detail(name, "tokenizer") == b[0].detail(name, "tokenizer")
    ppl = row_of(*nll, before[:, TOKENS], perplexity) if one_tokenizer else None
    seed = noise.half_width(len(a), len(b)) if noise else None
    if seed is not None:
        middle, low, high = (bits[key] for key in ("difference", "low", "high"))
        bits["with_seeds"] = [middle - math.hypot(middle - low, seed), middle + math.hypot(high - middle, seed)]
    word, why = call(bits, noise, seed, len(a), len(b), len(size), only_seed)
    return {"bits_per_byte": bits, "ppl": ppl, "verdict": word, "why": why, "exact": exact}


def row_of(a: np.ndarray, b: np.ndarray, weight: np.ndarray, scale: Callable[[float], float] = float) -> dict[str, Any]:
    """A figure of A and B, B - A, and the interval of that over documents (none of one document)."""
    of_a, of_b = float(a.sum() / weight.sum()), float(b.sum() / weight.sum())
    low, high = interval(b - a, weight) if len(weight) > 1 else (-math.inf, math.inf)
    ends = [scale(of_a + end) - scale(of_a) if math.isfinite(end) else end for end in (low, high)]
    row = {"a": scale(of_a), "b": scale(of_b), "difference": scale(of_b) - scale(of_a), "low": ends[0], "high": ends[1]}
    return row | {"with_seeds": None}


def call(bits: dict, noise: Noise | None, seed: float | None, a: int, b: int, rows: int, only_seed: bool) -> tuple:
    """The word, and why: what it would take to tell, and what is not known."""
    difference, (low, high) = bits["difference"], bits["with_seeds"] or (bits["low"], bits["high"])
    if only_seed:
        spread = f", ± {noise.sd:.4f} over {noise.source}" if noise else ""
        return UNSURE, "the same figures" if difference == 0 else f"only the seed differs: training noise{spread}"
    if rows < FEWEST_ROWS:
        return UNSURE, f"{rows} test document{'s' * (rows > 1)}: too few to resample ({FEWEST_ROWS} at least)"
    word, clear = BETTER if difference < 0 else WORSE, low > 0 or high < 0
    if clear and noise:
        return word, f"beyond test documents and seeds ({noise.source})"
    if clear:
        why = "the training noise is unknown: `make seeds N=3` measures it; on these documents alone it is"
        return UNSURE, f"{why} {word}"
    if difference == 0:
        return UNSURE, "the same figures"
    half = (bits["high"] - bits["low"]) / 2
    needs = []
    if half >= abs(difference) or seed is None:
        needs.append(many((half / difference) ** 2, "about {} times the test text", 2))
    if seed is not None and seed >= abs(difference):
        runs = 2 * (1.96 * noise.sd / difference) ** 2 + 1  # seeds of each for a half width of the difference
        needs.append(many(runs - min(a, b), "{} more seeds of each", 1))
    if not needs:  # neither alone hides it
        needs = [many(max(a, b) + 1 - min(a, b), "{} more seeds of each", 1)]
    about = f" (training noise: {noise.source})" if noise else " (the training noise is unknown)"
    return UNSURE, f"to tell: {' and '.join(needs)}{about}"


def many(count: float, words: str, least: int) -> str:
    count = max(least, math.ceil(count))
    words = words.replace("seeds", "seed") if count == 1 else words
    return words.format(f"{count:,}" if count <= MOST else f"more than {MOST:,}")


def differing(a: Run, b: Run, name: str) -> list[str]:
    """What keeps two runs' bits per byte on a set from being compared, in the reader's words."""
    for run in (a, b):
        if name not in run.documents or run.detail(name, "text") is None:
            return [f"{run.label} has no metrics/documents.csv of {name}: run `dvc repro` there"]
    found = [f"the text of {name} differs"] * (a.detail(name, "text") != b.detail(name, "text"))
    if a.stride(name) != b.stride(name) and a.detail(name, "stride") != b.detail(name, "stride"):
        found.append("evaluate.stride differs")
    if not found and len(a.documents[name]) != len(b.documents[name]):
        found = [f"documents.csv groups the documents of {name} otherwise"]
    lossy = [run for run in (a, b) if run.detail(name, "changed_documents")]
    if lossy and a.detail(name, "tokenizer") != b.detail(name, "tokenizer"):
        found.append(f"the tokenizer of {lossy[0].label} changes the text of {name}")
    return found


def seed_groups(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs of the same settings, text and code, one a seed (the newest), newest first, by recipe."""
    groups = defaultdict(dict)
    for run in runs:
        groups[run.recipe].setdefault(run.seed, run)
    return {recipe: list(seeds.values()) for recipe, seeds in groups.items()}


def with_seeds(run: Run, groups: dict[str, list[Run]]) -> list[Run]:
    """The run, and those of its recipe under other seeds."""
    return [run, *(other for other in groups.get(run.recipe, []) if other.seed != run.seed)]


def noise_of(a: Run, b: Run, name: str, groups: dict[str, list[Run]]) -> Noise | None:
    """The training noise to judge B against A by: their own seeds', else that of the nearest group in size."""
    own = [groups[recipe] for recipe in dict.fromkeys((a.recipe, b.recipe)) if len(groups.get(recipe, [])) > 1]
    if own:
        return pooled(own, name, " and ".join(f"{len(group)} seeds of {group[0].label}" for group in own))
    sizes = np.array([number(run.timing, "parameters") for run in (a, b)])
    found = []
    for group in groups.values():
        if len(group) > 1 and not differing(group[0], a, name):
            size = number(group[0].timing, "parameters")
            away = float(np.abs(np.log(size / sizes)).max())  # NaN where a size is unknown
            if away <= math.log(OF_THE_SAME_SIZE):
                found.append((away, len(found), group))
    if not found:
        return None
    group = min(found)[2]
    return pooled([group], name, f"taken from {len(group)} seeds of {group[0].label}, the nearest in size")


def pooled(groups: list[list[Run]], name: str, source: str) -> Noise | None:
    """Standard deviation of bits per byte between seeds, pooled over groups."""
    values = [np.array([run.number(name, "bits_per_byte") for run in group]) for group in groups]
    degrees = sum(len(each) - 1 for each in values)
    squares = sum(float(((each - each.mean()) ** 2).sum()) for each in values)
    return Noise(math.sqrt(squares / degrees), degrees, source) if math.isfinite(squares) else None
