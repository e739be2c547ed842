"""Measures this project beside its peers and writes benchmarks/results.md: `make bench`.

One section: `python -m benchmarks.run training --shapes '[wide]' --rounds 7`. All: `python -m benchmarks.run all`.
"""

import json
import math
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from benchmarks.contenders import matrix_flops
from benchmarks.turns import ROOT, Contender, interleave, measured_turn
from stages.common.devices import auto_precision

import pandas as pd
import torch
import transformers
import yaml
from jsonargparse import auto_cli

RESULTS = ROOT / "benchmarks" / "results.md"
CUDA = torch.cuda.is_available()
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each start of a stage would compile it again

BARS = ["bar", "median", "wanted", ""]
FLOAT32 = {"trainer.precision": "32-true"}
BF16 = {"trainer.precision": "bf16-mixed"}
SMALL = FLOAT32 | {"tokenizer.algorithm": "byte", "model.block_size": 64, "optimizer.batch_size": 12}
WIDE = FLOAT32 | {
    "tokenizer.vocab_size": 8192,
    "model.block_size": 256,
    "model.n_layer": 6,
    "model.n_head": 6,
    "model.n_embd": 384,
    "optimizer.batch_size": 8,
}
GPT2 = {
    "tokenizer.vocab_size": 50257,
    "model.block_size": 1024,
    "optimizer.lr": 6e-4,
    "trainer.precision": "bf16-mixed",
    "trainer.val_check_interval": 1.0,
    "model.compile": True,
}
SHAPES = {
    "default": {},
    "default-fp32": FLOAT32,
    "default-compiled": {"model.compile": True},
    "byte": SMALL,
    "byte-compiled": SMALL | {"model.compile": True},
    "byte-bf16": SMALL | BF16,
    "byte-bf16-compiled": SMALL | BF16 | {"model.compile": True},
    "wide": WIDE,
    "wide-bf16": WIDE | BF16 | {"model.compile": True},
    "gpt2": GPT2 | {"model.n_layer": 12, "model.n_head": 12, "model.n_embd": 768, "optimizer.batch_size": 16},
    "gpt2-medium": GPT2 | {"model.n_layer": 24, "model.n_head": 16, "model.n_embd": 1024, "optimizer.batch_size": 8},
}
Shape = Literal[
    "default",
    "default-fp32",
    "default-compiled",
    "byte",
    "byte-compiled",
    "byte-bf16",
    "byte-bf16-compiled",
    "wide",
    "wide-bf16",
    "gpt2",
    "gpt2-medium",
]
HERE: list[Shape] = ["default", "default-fp32", "byte", "wide", "wide-bf16", *(["gpt2", "gpt2-medium"] if CUDA else [])]

TURNS = {"callbacks": [{"class_path": "benchmarks.turns.TakesTurns"}]}


def training(shapes: list[Shape] = HERE, rounds: int = 5, seconds: float = 3.0) -> None:
    """Training tokens per second and model FLOPs utilisation, steady state.

    Args:
        shapes: which shapes.
        rounds: turns of each contender.
        seconds: length of a turn.
    """
    for shape in shapes:
        with project(shape) as (folder, params):
            print(f"training, {shape}:", flush=True)
            stage = train_stage("train stage", folder, params)
            names = ["transformers_eager", "transformers_compiled", "compact_eager", "compact_compiled"]
            names += ["nanogpt", "nanogpt_with_biases", "nanogpt_compiled"] if "NANOGPT" in os.environ else []
            bare = [contender(name, folder) for name in ("own_step", *names, "transformers_trainer")]
            products = [contender("matrix_product", folder)]
            if not CUDA and params["trainer"]["precision"] == "32-true":
                products.append(contender("onednn_matrix_product", folder))
            rates, note = interleave([stage, *bare, *products], rounds, seconds, 4)
            command = f"python -m benchmarks.run training --shapes '[{shape}]' --rounds {rounds} --seconds {seconds:g}"
            record(f"Training, {shape}", command, training_tables(params, folder, rates) + f"\n\n{note}")


def training_tables(params: dict, folder: Path, rates: dict[str, list]) -> str:
    model, B = params["model"], params["optimizer"]["batch_size"]
    L, C, T = model["n_layer"], model["n_embd"], model["block_size"]
    V = yaml.safe_load((folder / "data/blocks/meta.json").read_text())["vocab_size"]
    N = 12 * L * C**2 + V * C
    flops = 6 * N + 12 * L * C * T
    products = {name: rates.pop(name) for name in list(rates) if "matrix" in name}
    tokens = {name: [rate * B * T for rate in values] for name, values in rates.items()}
    own = tokens["train stage"]
    peaks = {name: [rate * matrix_flops() for rate in values] for name, values in products.items()}
    rows = [
        [
            name.replace("_", " "),
            spread(values, "{:,.0f}"),
            spread(ratios(own, values), "{:.2f}") if name != "train stage" else "",
            *(percent(ratios([v * flops for v in values], peak)) for peak in peaks.values()),
        ]
        for name, values in tokens.items()
    ]
    peers = {
        name: tokens[name]
        for name in tokens
        if name.startswith(("transformers_e", "transformers_c", "compact", "nanogpt"))
    }
    fastest = max(peers, key=lambda name: statistics.median(peers[name]))
    utilisation = statistics.median(ratios([v * flops for v in own], peaks["matrix_product"]))
    bar = 0.7 if params["trainer"]["precision"] == "bf16-mixed" or C < 384 else 0.95
    bar = 0.5 if CUDA else bar
    others = {"transformers_trainer": ("transformers.Trainer", 1.2), "own_step": ("its own step in a bare loop", 0.97)}
    bars = [
        [f"train stage / fastest peer ({fastest.replace('_', ' ')})", median_ratio(own, peers[fastest]), 1.0],
        *(
            [f"train stage / {words}", median_ratio(own, tokens[name]), least]
            for name, (words, least) in others.items()
            if name in tokens
        ),
        [
            f"utilisation ({'bf16' if 'bf16' in params['trainer']['precision'] else 'fp32'} torch.matmul)",
            utilisation,
            bar,
        ],
    ]
    columns = [
        "contender",
        "tokens/s",
        "train stage / it",
        *(f"utilisation, {name.replace('_', ' ')}" for name in peaks),
    ]
    peak_lines = "\n".join(
        f"- {name.replace('_', ' ')}: {spread([v / 1e9 for v in values], '{:,.0f}')} GFLOP/s"
        for name, values in peaks.items()
    )
    compiled = ", model.compile: true" if model["compile"] else ""
    return f"""\
V {V:,}, T {T}, {L} layers, {model["n_head"]} heads, {C} wide, batch {B}, {params["trainer"]["precision"]}{compiled}: \
N = {N:,}, {flops / 1e6:,.1f} MFLOP a token.

{table(columns, rows)}

{peak_lines}

{bars_table(bars)}"""


def optimizers(shapes: list[Shape] = ["byte", "default", "wide-bf16"], rounds: int = 5, seconds: float = 3.0) -> None:  # noqa: B006
    """What a step with Muon takes beside one with AdamW, in the train stage.

    Args:
        shapes: which shapes.
        rounds: turns of each contender.
        seconds: length of a turn.
    """
    for shape in shapes:
        with ExitStack() as projects:
            print(f"optimizers, {shape}:", flush=True)
            stages = []
            for name in ("muon", "adamw"):
                folder, params = projects.enter_context(project(shape))
                params["optimizer"]["name"] = name
                stages.append(train_stage(name, folder, params))
            rates, note = interleave(stages, rounds, seconds, 4)
            bars = [at_most("a step with Muon / with AdamW", ratio_of(rates, "adamw", "muon"), 1.10)]
            tokens = params["model"]["block_size"] * params["optimizer"]["batch_size"]
            command = (
                f"python -m benchmarks.run optimizers --shapes '[{shape}]' --rounds {rounds} --seconds {seconds:g}"
            )
            body = f"{rates_table(rates, tokens, 'tokens/s')}\n\n{table(BARS, bars)}\n\n{note}"
            record(f"Optimizers, {shape}", command, body)


def split(shapes: list[Shape] = ["byte", "default", "wide-bf16"]) -> None:  # noqa: B006
    """Where a training step's time goes, uncompiled, and its limit: what its matrix products take alone.

    Args:
        shapes: which shapes.
    """
    for shape in shapes:
        with project(shape) as (folder, params):
            print(f"split, {shape}:", flush=True)
            write_params(folder, params)
            said = json.loads(run_module("benchmarks.split", folder, "--model.compile", "false"))
        step, alone = said["step"], said["products alone"]
        rows = [[kind, f"{1000 * share * step:.1f}", f"{share:.0%}"] for kind, share in said["kinds"].items()]
        rows.append(["**all**", f"{1000 * step:.1f}", "100%"])
        limit = (
            f"- the products alone, one by one: {1000 * alone:.1f} ms, {said['flops'] / alone / 1e9:,.0f} GFLOP/s\n"
            f"- that limit / the step: {alone / step:.2f}"
        )
        command = f"python -m benchmarks.run split --shapes '[{shape}]'"
        record(f"A step's time, {shape}", command, f"{table(['', 'ms', 'share'], rows)}\n\n{limit}")


def quality(shapes: list[Shape] = HERE, steps: int = 60) -> None:
    """Loss curves: what the train stage does for speed beside a plain float32 eager run.

    Args:
        shapes: which shapes; those in bf16 are compared with the float32 run too.
        steps: optimizer steps of each run.
    """
    for shape in shapes:
        with project(shape) as (folder, params):
            print(f"quality, {shape}:", flush=True)
            params["trainer"] |= {"max_steps": steps, "val_check_interval": 1.0, "limit_val_batches": 2}
            params["optimizer"]["num_warmup_steps"] = steps // 6
            write_params(folder, params)
            curves = {"plain fp32": plain_curve(folder), "plain fp32, another seed": plain_curve(folder, 2)}
            for precision in dict.fromkeys(("32-true", "bf16-mixed", params["trainer"]["precision"])):
                run_stage("train", folder, "--trainer.precision", precision)
                curves[f"train stage, {precision}"] = pd.read_csv(folder / "metrics/train.csv")["train_loss"].tolist()
            command = f"python -m benchmarks.run quality --shapes '[{shape}]' --steps {steps}"
            record(f"Loss curves, {shape}", command, curves_table(curves, steps))


def plain_curve(folder: Path, seed: int = 1) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.contenders", "plain_curve", "--seed_everything", str(seed)]
        + ["--trainer.precision", "32-true"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
    )
    return [float(line) for line in done.stdout.split()]


def curves_table(curves: dict[str, list[float]], steps: int) -> str:
    """Loss at some steps, and the mean of the last ten and of all, with its distance to the first curve."""
    points = [1, *range(steps // 6, steps + 1, steps // 6)]
    plain = curves["plain fp32"]
    rows = [
        [
            name,
            *(f"{losses[i - 1]:.4f}" for i in points),
            f"{statistics.mean(losses[-10:]):.4f}",
            f"{statistics.mean(losses[-10:]) - statistics.mean(plain[-10:]):+.4f}",
            f"{max(abs(a - b) for a, b in zip(losses, plain, strict=True)):.4f}",
        ]
        for name, losses in curves.items()
    ]
    columns = ["run", *(f"step {i}" for i in points), "last 10", "less the first", "largest difference of a step"]
    return table(columns, rows)


def evaluation(shapes: list[Shape] = HERE, rounds: int = 5, seconds: float = 3.0) -> None:
    """Tokens per second of the evaluate stage's scoring beside a bare forward loop.

    Args:
        shapes: which shapes; both compute in the precision of the training.
        rounds: turns of each contender.
        seconds: length of a turn.
    """
    for shape in shapes:
        with project(shape) as (folder, params):
            print(f"evaluation, {shape}:", flush=True)
            names = ("evaluate_stage", "forward_eager", "forward_compiled")
            rates, note = interleave([contender(name, folder) for name in names], rounds, seconds, 3)
            tokens = params["optimizer"]["batch_size"] * params["model"]["block_size"]
            command = (
                f"python -m benchmarks.run evaluation --shapes '[{shape}]' --rounds {rounds} --seconds {seconds:g}"
            )
            bars = [["evaluate stage / bare eager forward loop", ratio_of(rates, names[0], names[1]), 0.95]]
            record(
                f"Evaluation, {shape}",
                command,
                f"{rates_table(rates, tokens, 'tokens/s')}\n\n{bars_table(bars)}\n\n{note}",
            )


def tokenizing(rounds: int = 5, megabytes: int = 32) -> None:
    """MB per second of tokenize_blocks beside bare encode_batch, and of train_tokenizer beside the bare trainer.

    Args:
        rounds: turns of each contender; a turn is one pass over the text.
        megabytes: size of the text.
    """
    with project("default", megabytes) as (folder, _):
        print("tokenizing:", flush=True)
        command = f"python -m benchmarks.run tokenizing --rounds {rounds} --megabytes {megabytes}"
        size = (folder / "text/train.txt").stat().st_size / 1e6
        names = ("tokenize_stage", "encode_batch", "encode_batch_fast")
        rates, note = interleave([contender(name, folder) for name in names], rounds, 0)
        bars = bars_table([["tokenize_blocks stage / encode_batch", ratio_of(rates, names[0], names[1]), 0.9]])
        record(
            "Tokenizing", command, f"{size:,.0f} MB of text.\n\n{rates_table(rates, size, 'MB/s')}\n\n{bars}\n\n{note}"
        )
        names = ("train_tokenizer_stage", "bare_tokenizer_trainer")
        rates, note = interleave([contender(name, folder) for name in names], rounds, 0)
        record(
            "Training a tokenizer", command, f"{size:,.0f} MB of text.\n\n{rates_table(rates, size, 'MB/s')}\n\n{note}"
        )


def pipeline(rounds: int = 5) -> None:
    """`dvc repro` with nothing to do beside `dvc status`; from the train stage's start to its first step.

    Args:
        rounds: how often each is done.
    """
    print("pipeline:", flush=True)
    command = f"python -m benchmarks.run pipeline --rounds {rounds}"
    with tempfile.TemporaryDirectory() as name:
        folder = small_checkout(Path(name))
        dvc(folder, "repro")
        times = {"dvc repro": [], "dvc status": []}
        for _ in range(rounds):
            for words, seconds in times.items():
                started = time.perf_counter()
                dvc(folder, words.split()[1])
                seconds.append(time.perf_counter() - started)
        record("Nothing to do", command, seconds_table(times))

    with project("default") as (folder, params):
        params["trainer"] |= TURNS
        write_params(folder, params)
        times = {"train stage": [], "plain script": []}
        for i in range(rounds + 1):
            for (name, seconds), module in zip(times.items(), ("stages.train", "benchmarks.plain_start")):
                started = time.perf_counter()
                starting = Contender(name, module, cwd=folder)
                seconds += [starting.turn(0)["started"] - started] if i else []  # the first fills the disk cache
                starting.end()
        bars = [at_most("train stage / plain script", median_ratio(*times.values()), 1.0)]
        body = f"{seconds_table(times)}\n\n{table(BARS, bars)}"
        record("From start to first training step", command, body)


def busy(shape: Shape = "default", rounds: int = 5, seconds: float = 3.0, waits: list[str] = ["as it is"]) -> None:  # noqa: B006
    """What the train stage keeps of its rate while another process computes on each core.

    Args:
        shape: which one.
        rounds: turns of each contender, half of them beside the others.
        seconds: length of a turn.
        waits: contenders: "as it is", or an environment variable as NAME=VALUE, for OpenMP's ways to wait.
    """
    print(f"busy, {shape}:", flush=True)
    with ExitStack() as projects:
        rows, stages = [], []
        for wait in waits:
            # Each in a folder of its own: two trainings never work in one, the second would wait for the first.
            folder, params = projects.enter_context(project(shape))
            stages.append(train_stage(wait, folder, params, **dict([wait.split("=")] if "=" in wait else [])))
            stages[-1].turn(0.5, 4)
        rates = {wait: ([], []) for wait in waits}
        for _ in range(rounds):
            for stage in stages:
                rates[stage.name][0].append(measured_turn(stage, seconds)[1])
            others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
            for stage in stages:
                turn = stage.turn(seconds)
                rates[stage.name][1].append(turn["steps"] / turn["seconds"])
            for other in others:
                other.kill()
                other.wait()
        for stage in stages:
            stage.end()
        tokens = params["model"]["block_size"] * params["optimizer"]["batch_size"]
        for wait, (quiet, beside) in rates.items():
            tokens_s = [spread([tokens * rate for rate in some], "{:,.0f}") for some in (quiet, beside)]
            rows.append([wait, *tokens_s, percent(ratios(beside, quiet))])
        columns = ["contender", "quiet, tokens/s", "beside a busy process a core", "kept"]
        command = f"python -m benchmarks.run busy --shape {shape} --rounds {rounds} --seconds {seconds:g}"
        command += f" --waits '{json.dumps(waits)}'"
        record(f"On a busy machine, {shape}", command, table(columns, rows))


def plan(shapes: list[Shape] = HERE) -> None:
    """What tools.plan says of a training, and what it then took.

    Args:
        shapes: which shapes.
    """
    rows = []
    for shape in shapes:
        steps = {"default": 456, "byte": 4000}.get(shape, 100)
        arguments = ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps // 4)]
        with project(shape) as (folder, params):
            print(f"plan, {shape}:", flush=True)
            write_params(folder, params)
            said = run_module("tools.plan", folder, *arguments)
            run_stage("train", folder, *arguments)
            figures = json.loads((folder / "metrics/run.json").read_text())
        for key, pattern, took, most in (
            ("minutes", r"^minutes +([\d.,]+)", figures["train_seconds"] / 60, 0.15),
            ("MiB", r"^memory +([\d,]+) MiB", figures["peak_memory_mb"], 0.10),
        ):
            planned = float(re.search(pattern, said, re.M)[1].replace(",", ""))
            off = planned / took - 1
            met = "met" if abs(off) <= most else "**missed**"
            rows.append([shape, key, f"{planned:,.2f}", f"{took:,.2f}", f"{off:+.1%}", f"within {most:.0%}", met])
    columns = ["shape", "", "planned", "took", "off by", "wanted", ""]
    record("Plan", f"python -m benchmarks.run plan --shapes '[{', '.join(shapes)}]'", table(columns, rows))


def small_checkout(folder: Path) -> Path:
    """A repository with this checkout's files and a model that trains in seconds."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    for name in names:
        if (ROOT / name).is_file() and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["model"] |= {"n_layer": 1, "n_head": 1, "n_embd": 16}
    params["trainer"] |= {"max_steps": 60}
    write_params(folder, params)
    person = ["-c", "user.name=bench", "-c", "user.email=bench@example.com"]
    for words in (["init", "-q"], ["add", "-A"], [*person, "commit", "-q", "-m", "bench"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


def dvc(folder: Path, command: str) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["dvc", command], cwd=folder, env=environment, check=True, capture_output=True)


def growth(megabytes: list[int] = [4, 16, 64, 256]) -> None:  # noqa: B006
    """Time and peak memory of each stage on more and more text, with a small model and 30 training steps.

    Args:
        megabytes: sizes of train_file; valid_file and test_file have a 64th of it each.
    """
    print("growth:", flush=True)
    stages = ("prepare_corpus", "train_tokenizer", "tokenize_blocks", "train", "evaluate")
    seconds = {stage: [] for stage in stages}
    memory = {stage: [] for stage in stages}
    for size in megabytes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            params = yaml.safe_load((ROOT / "params.yaml").read_text())
            params["model"] |= {"n_layer": 1, "n_head": 1, "n_embd": 32}
            params["optimizer"] |= {"num_warmup_steps": 5}
            params["trainer"] |= {"max_steps": 30}
            grow_text(folder, params, size * 10**6, size * 10**6 // 64)
            for stage in stages:
                started = time.perf_counter()
                process = subprocess.Popen(
                    [sys.executable, "-m", f"stages.{stage}"],
                    cwd=folder,
                    env={**os.environ, "PYTHONPATH": str(ROOT)},
                    stdout=subprocess.DEVNULL,
                )
                _, status, usage = os.wait4(process.pid, 0)
                if status:
                    raise RuntimeError(f"{stage} failed on {size} MB")
                seconds[stage].append(f"{time.perf_counter() - started:.1f} s")
                memory[stage].append(f"{usage.ru_maxrss / 1024:,.0f} MiB")
    columns = ["stage", *(f"{size} MB" for size in megabytes)]
    rows = [[stage, *(f"{s}, {m}" for s, m in zip(seconds[stage], memory[stage]))] for stage in stages]
    command = f"python -m benchmarks.run growth --megabytes '{megabytes}'"
    record("Growth", command, f"Seconds and peak memory of one run of each stage.\n\n{table(columns, rows)}")


NANOGPT_RECIPE = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)
SHAKESPEARE = {
    "data.train_file": "data/my/train.txt",
    "data.valid_file": "data/my/valid.txt",
    "data.test_file": "data/my/valid.txt",
    "tokenizer.vocab_size": 1024,
    "model.block_size": 64,
    "optimizer.batch_size": 24,
    "optimizer.num_warmup_steps": 10,
    "trainer.max_epochs": None,
    "trainer.max_steps": 85,
    "trainer.val_check_interval": 85,
    "trainer.check_val_every_n_epoch": None,
}


def shakespeare() -> None:
    """Tiny Shakespeare to 1.88 nats a character: `dvc repro` in a fresh clone beside nanoGPT's train.py with the
    recipe of its README for CPUs, in a checkout that NANOGPT names and that has data/shakespeare_char/input.txt."""
    nanogpt = Path(os.environ["NANOGPT"]).resolve()
    text = (nanogpt / "data/shakespeare_char/input.txt").read_text()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        other = shutil.copytree(nanogpt, Path(name) / "nanogpt")
        subprocess.run([sys.executable, "data/shakespeare_char/prepare.py"], cwd=other, check=True, capture_output=True)
        started = time.perf_counter()
        command = [sys.executable, "train.py", *NANOGPT_RECIPE.split()]
        said = subprocess.run(command, cwd=other, check=True, capture_output=True, text=True).stdout
        seconds = time.perf_counter() - started
        losses = re.findall(r"step (\d+): .* val loss ([\d.]+)", said)
        rows.append([f"nanoGPT: {NANOGPT_RECIPE}", f"{seconds:.1f}", min(loss for _, loss in losses)])

        folder = Path(name) / "clone"
        subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
        (folder / "data/my").mkdir()
        (folder / "data/my/train.txt").write_text(text[: int(0.9 * len(text))])
        (folder / "data/my/valid.txt").write_text(text[int(0.9 * len(text)) :])
        params = yaml.safe_load((folder / "params.yaml").read_text())
        set_values(params, SHAKESPEARE)
        write_params(folder, params)
        started = time.perf_counter()
        dvc(folder, "repro")
        own = time.perf_counter() - started
        bits = json.loads((folder / "metrics/eval.json").read_text())["valid"]["bits_per_byte"]
        rows.append(["`dvc repro`", f"{own:.1f}", f"{bits * math.log(2):.3f}"])
    bars = [at_most("dvc repro / nanoGPT's train.py", own / seconds, 1 / 3)]
    settings = ", ".join(f"{key} {json.dumps(value)}" for key, value in SHAKESPEARE.items())
    body = (
        f"{table(['', 'seconds', 'nats a character, valid'], rows)}\n\n{table(BARS, bars)}\n\nIts settings: {settings}."
    )
    record("Tiny Shakespeare to 1.88 nats a character", "NANOGPT=CHECKOUT python -m benchmarks.run shakespeare", body)


def quick() -> None:
    """Two shapes in short turns, printed and not written into the results."""
    global RESULTS
    RESULTS = None
    training(["default", "byte"], rounds=3, seconds=1)
    evaluation(["default"], rounds=3, seconds=1)


def all_sections(rounds: int = 5) -> None:
    """Every section.

    Args:
        rounds: turns of each contender.
    """
    training(rounds=rounds)
    optimizers(rounds=rounds)
    split()
    quality()
    evaluation(rounds=rounds)
    tokenizing(rounds=rounds)
    pipeline(rounds=rounds)
    growth()
    plan()


# Projects to measure in


@contextmanager
def project(shape: str, megabytes: int = 0):
    """A temporary folder with the sample corpus, or so much text, as token blocks; and its params."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["optimizer"] |= {"name": "adamw", "lr": 1e-3}  # as the peers have it
    params["trainer"]["precision"] = auto_precision("auto")
    set_values(params, SHAPES[shape])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        grow_text(folder, params, megabytes * 10**6, 10**5)
        for stage in ("prepare_corpus", "train_tokenizer", "tokenize_blocks"):
            run_stage(stage, folder)
        if "gpt2" in shape:
            # The sample has too few words for GPT-2's vocabulary, but its output layer has the full size.
            meta = json.loads((folder / "data/blocks/meta.json").read_text())
            (folder / "data/blocks/meta.json").write_text(json.dumps(meta | {"vocab_size": 50257}))
        yield folder, params


def grow_text(folder: Path, params: dict, train_bytes: int, other_bytes: int) -> None:
    """The sample corpus; where more is wanted, again and again with its chapters in another order."""
    write_params(folder, params)
    run_stage("sample_corpus", folder)
    if not train_bytes:
        return
    for split, size in (("train", train_bytes), ("valid", other_bytes), ("test", other_bytes)):
        chapters = Path(folder, params["data"][f"{split}_file"]).read_text(encoding="utf-8").strip().split("\n\n")
        params["data"][f"{split}_file"] = f"text/{split}.txt"
        path, order = folder / "text" / f"{split}.txt", random.Random(0)
        path.parent.mkdir(exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            while file.tell() < size:
                for chapter in order.sample(chapters, len(chapters)):
                    file.write(f"{chapter}\n\n")
                    if file.tell() >= size:
                        break
    write_params(folder, params)


def set_values(params: dict, values: dict) -> None:
    for key, value in values.items():
        group, leaf = key.split(".")
        params[group][leaf] = value


def write_params(folder: Path, params: dict) -> None:
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def run_stage(stage: str, folder: Path, *arguments: str) -> None:
    run_module(f"stages.{stage}", folder, *arguments)


def run_module(module: str, folder: Path, *arguments: str) -> str:
    """What it prints."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


def train_stage(name: str, folder: Path, params: dict, **environment: str) -> Contender:
    """The train stage in a project, as a contender."""
    params["trainer"] |= TURNS | {"max_epochs": 100}  # it must not end before the last round
    write_params(folder, params)
    return Contender(name, "stages.train", cwd=folder, environment=environment)


def contender(name: str, folder: Path, *arguments: str) -> Contender:
    return Contender(name, "benchmarks.contenders", name, *arguments, cwd=folder)


# Figures and their page


def ratios(a: list[float], b: list[float]) -> list[float]:
    """Of each round: what drifts from round to round falls out."""
    return [x / y for x, y in zip(a, b, strict=True)]


def median_ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(ratios(a, b))


def ratio_of(rates: dict[str, list[float]], name: str, other: str) -> float:
    return median_ratio(rates[name], rates[other])


def rates_table(rates: dict[str, list[float]], unit: float, unit_name: str) -> str:
    """Rates in steps per second as units per second, and the first contender's ratio to the others."""
    (first, own), *_ = rates.items()
    form = "{:,.0f}" if unit_name == "tokens/s" else "{:.2f}"
    rows = [
        [
            name.replace("_", " "),
            spread([rate * unit for rate in values], form),
            "" if name == first else spread(ratios(own, values), "{:.2f}"),
        ]
        for name, values in rates.items()
    ]
    return table(["contender", unit_name, f"{first.replace('_', ' ')} / it"], rows)


def seconds_table(times: dict[str, list[float]]) -> str:
    (first, own), *_ = times.items()
    rows = [
        [name, spread(values, "{:.2f}"), "" if name == first else spread(ratios(own, values), "{:.2f}")]
        for name, values in times.items()
    ]
    return table(["", "seconds", f"{first} / it"], rows)


def spread(values: list[float], form: str) -> str:
    middle, low, high = (form.format(x) for x in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})"


def percent(values: list[float]) -> str:
    return spread([100 * value for value in values], "{:.0f}%")


def table(columns: list[str], rows: list[list]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def at_most(name: str, value: float, most: float) -> list[str]:
    return [name, f"{value:.2f}", f"at most {most:.2f}", "met" if value <= most else "**missed**"]


def bars_table(bars: list[list]) -> str:
    """Rows of a figure's name, its value and the least (or, for times, the most) that it should be."""
    return table(
        BARS,
        [
            [name, f"{value:.2f}", f"at least {bar:.2f}", "met" if value >= bar else "**missed**"]
            for name, value, bar in bars
        ],
    )


def machine() -> str:
    device = torch.cuda.get_device_name() if CUDA else "no GPU"
    return (
        f"{processor()}, {len(os.sched_getaffinity(0))} cores, {device}; "
        f"torch {torch.__version__} ({torch.get_num_threads()} threads), transformers {transformers.__version__}, "
        f"Python {platform.python_version()}"
    )


def processor() -> str:
    return torch.cpu.get_capabilities().get("cpu_name") or platform.machine()


def record(title: str, command: str, body: str) -> None:
    """Prints a section and puts it into the results in place of the section of the same title and processor."""
    title = f"{title}: {torch.cuda.get_device_name() if CUDA else processor()}"
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    section = f"## {title}\n\n`{command}`\n\n{machine()}; commit {commit}\n\n{body}\n"
    print(f"\n{section}", flush=True)
    if RESULTS is None:
        return
    text = RESULTS.read_text() if RESULTS.exists() else HEAD
    head, *sections = re.split(r"^(?=## )", text, flags=re.M)
    sections = [s.rstrip() + "\n" for s in sections]
    same = [i for i, s in enumerate(sections) if s.startswith(f"## {title}\n")]
    if same:
        sections[same[0]] = section
    else:
        sections.append(section)
    RESULTS.write_text("\n".join([HEAD, *sections]))


HEAD = """\
# Benchmark results

`make bench` writes this page; a section can be measured alone, by the command under its title. Every number is
a median, with the smallest and largest of all rounds in brackets. In a round each contender has one turn, and
computes alone; a ratio is the median of the rounds' ratios, so a machine that gets slower or faster during the
run moves both sides. A turn in which other processes used more than a twentieth of the CPU is done again, at
most twice; each section says how much of that is left. Numbers of different sections were not measured at the
same time: don't compare them.

Training tokens per second are steady-state: start-up and compiling come before the first round. The
validation that only the train stage does is not counted; its logging, progress line and the saving of
checkpoints are. All train with AdamW, at a learning rate of 1e-3 (GPT-2's shapes: 6e-4), but where the optimizers
are compared. Utilisation is a token's FLOPs times tokens per second, over the rate of a large square matrix product
in the same precision. A token takes 6 N + 12 L C T FLOPs, forward and backward: N = 12 L C² + V C weights in matrix
products (the tied embeddings count once, as the output layer), and attention to T positions as if it weren't causal
(appendix B of the PaLM paper, https://arxiv.org/abs/2204.02311).
"""


if __name__ == "__main__":
    auto_cli(
        {
            "all": all_sections,
            "quick": quick,
            "training": training,
            "optimizers": optimizers,
            "split": split,
            "quality": quality,
            "evaluation": evaluation,
            "tokenizing": tokenizing,
            "pipeline": pipeline,
            "growth": growth,
            "plan": plan,
            "busy": busy,
            "shakespeare": shakespeare,
        }
    )
