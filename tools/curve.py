"""What longer trainings brought, and what another doubling would: loss over tokens, with a power law.

python -m tools.curve epochs-1 epochs-2 epochs-4 epochs-8

It reads runs that differ in their length only from Git, prints them and writes the picture curve.svg.
"""

import math
from pathlib import Path

from stages.common.commands import CommandLine
from stages.common.errors import UserError, run
from stages.training.identity import HORIZON
from tools.runs import SEED, Run, find, history, number, revisions_of

import numpy as np
import vl_convert
from scipy.optimize import curve_fit
from scipy.stats import t

FURTHEST = 4  # times the tokens of the longest run: beyond, the law is a guess
LENGTH = {f"{group}.{key}" for group, keys in HORIZON.items() for key in keys} | {SEED}
PICTURE = Path("curve.svg")


def main() -> None:
    command = CommandLine("tools.curve", __doc__)
    command.add_argument("runs", nargs="+", metavar="RUN", help="revision or experiment, three or more")
    names = command.parse_args().runs
    known = history(revisions=revisions_of(names))
    runs = [find(name, known) for name in names]
    for each in runs:
        check_alike(runs[0], each)
    points = sorted((number(run.timing, "tokens"), run.number("test", "loss")) for run in runs)
    tokens, losses = (np.array(column, float) for column in zip(*points, strict=True))
    if not np.isfinite([tokens, losses]).all():
        raise UserError("a run has no tokens in metrics/run.json, or no loss of test: run `dvc repro` there")
    if len(set(tokens)) < 3:
        raise UserError(f"{len(set(tokens))} lengths: a curve needs three or more runs of different lengths")
    further = tokens[-1] * np.geomspace(1, FURTHEST, 9)
    expected, low, high = extrapolated(tokens, losses, further)
    for size, loss in points:
        print(f"{size:16,.0f} tokens   test ppl {math.exp(loss):.2f}")
    for i in (4, 8):  # twice and four times the longest
        interval = f"[{math.exp(low[i]):.2f}, {math.exp(high[i]):.2f}]"
        print(f"{further[i]:16,.0f} tokens   test ppl {math.exp(expected[i]):.2f} {interval} expected")
    PICTURE.write_text(picture(tokens, losses, further, expected, low, high))


def check_alike(a: Run, b: Run) -> None:
    """Raises UserError when two runs differ in more than their length, or that isn't known."""
    if b.unknown:
        raise UserError(f"{b.label}: {b.unknown}, so whether it differs in its length only isn't known")
    for key in sorted(a.params.keys() | b.params.keys()):
        if key not in LENGTH and a.params.get(key) != b.params.get(key):
            raise UserError(f"{a.label} and {b.label} differ in {key}: a curve is of runs that differ in length only")
    if a.sources != b.sources:
        raise UserError(
            f"{a.label} and {b.label} differ in text or code: a curve is of runs that differ in length only"
        )


def power_law(tokens: np.ndarray, scale: float, exponent: float) -> np.ndarray:
    return scale * tokens**-exponent


def extrapolated(tokens: np.ndarray, losses: np.ndarray, further: np.ndarray) -> tuple[np.ndarray, ...]:
    """Loss at more tokens by the power law a D^-b through the runs, and the 95 % interval of one further run's.

    Args:
        tokens, losses: (N,) of the runs, N >= 3; losses in nats a token.
        further: (M,) tokens.
    Returns:
        expected, low, high: (M,) nats a token.
    """
    unit = tokens[-1]  # near 1, so that both parameters are of one size
    (scale, exponent), covariance = curve_fit(power_law, tokens / unit, losses, p0=(losses[-1], 0.1))
    expected = power_law(further / unit, scale, exponent)
    gradient = np.stack([expected / scale, -expected * np.log(further / unit)])
    free = len(tokens) - 2
    noise = np.sum((losses - power_law(tokens / unit, scale, exponent)) ** 2) / free
    width = t.ppf(0.975, free) * np.sqrt(noise + np.einsum("im,ij,jm->m", gradient, covariance, gradient))
    return expected, expected - width, expected + width


def picture(tokens: np.ndarray, losses: np.ndarray, further: np.ndarray, *law: np.ndarray) -> str:
    """The runs as points, the law beyond them as a dashed line within its interval: SVG."""
    runs = [{"tokens": x, "ppl": math.exp(y)} for x, y in zip(tokens, losses)]
    names = ("tokens", "ppl", "low", "high")
    beyond = [dict(zip(names, row)) for row in np.stack([further, *np.exp(law)], axis=1).tolist()]
    scales = [
        {"type": "log", "nice": False, "domain": [0.9 * min(each), 1.1 * max(each)]}
        for each in ([*tokens, *further], np.exp([*losses, *np.ravel(law)]).tolist())
    ]
    x = {"field": "tokens", "type": "quantitative", "scale": scales[0], "title": "tokens seen"}
    y = {"field": "ppl", "type": "quantitative", "scale": scales[1], "title": "test ppl"}
    layers = [
        (beyond, {"type": "area", "opacity": 0.3}, {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}}),
        (beyond, {"type": "line", "strokeDash": [4, 4]}, {"x": x, "y": y}),
        (runs, {"type": "line", "point": True}, {"x": x, "y": y}),
    ]
    chart = [{"data": {"values": values}, "mark": mark, "encoding": axes} for values, mark, axes in layers]
    return vl_convert.vegalite_to_svg({"width": 480, "height": 240, "layer": chart}) + "\n"


if __name__ == "__main__":
    run(main)
