"""Measures training, evaluation and generation on one GPU beside peers, and writes benchmarks/gpu.md.

    python -m benchmarks.gpu

It first runs the tests marked `gpu`. `--device cpu` does all of it with a tiny model on the CPU, prints the page
and writes nothing: to see that it works before there is a GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

MINIATURE = sys.argv[1:] == ["--device", "cpu"]
if MINIATURE:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from benchmarks import run  # noqa: E402 (torch looks for GPUs when it is imported)
from benchmarks.contenders import GENERATED  # noqa: E402
from benchmarks.turns import ROOT, Contender, interleave  # noqa: E402

PAGE = ROOT / "benchmarks" / "gpu.md"
TINY = run.SMALL | {"model.block_size": 16, "model.n_layer": 1, "model.n_head": 1, "model.n_embd": 16}
HEAD = """\
# On a GPU

`python -m benchmarks.gpu` writes this page; what its columns mean stands in [results.md](results.md).
"""


def main() -> None:
    if sys.argv[1:] and not MINIATURE:
        sys.exit("error: python -m benchmarks.gpu takes nothing, or --device cpu")
    if not MINIATURE and not run.CUDA:
        sys.exit("error: PyTorch finds no GPU here: `python -m benchmarks.gpu --device cpu` tries it in miniature")
    run.SHAPES["tiny"] = TINY
    parts = [HEAD, f"{run.machine()}\n", f"Tests marked `gpu`: {tests()}\n"]
    for shape in ["tiny"] if MINIATURE else ["gpt2", "gpt2-medium"]:
        parts.append(f"## {shape}\n\n{measured(shape)}\n")
    page = "\n".join(parts)
    print(page)
    if not MINIATURE:
        PAGE.write_text(page)


def tests() -> str:
    """pytest's last line."""
    if MINIATURE:
        return "not run in miniature"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip().split("\n")[-1]


def measured(shape: str) -> str:
    """The tables of a shape: training beside peers, its peak memory, evaluation and generation."""
    rounds, seconds = (1, 0.1) if MINIATURE else (3, 2.0)
    compiled = [] if MINIATURE else ["transformers_compiled", "compact_compiled"]
    with run.project(shape) as (folder, params):
        params["trainer"] |= {"max_steps": 20, "limit_val_batches": 2}
        params["optimizer"]["num_warmup_steps"] = 5
        run.write_params(folder, params)
        run.run_stage("train", folder)
        memory = json.loads((folder / "metrics/run.json").read_text())
        params["trainer"] |= run.TURNS | {"max_steps": -1, "max_epochs": 1000}
        run.write_params(folder, params)

        def rates_of(*names: str) -> tuple[dict, str]:
            return interleave([contender(name, folder) for name in names], rounds, seconds, 4)

        peers = ("transformers_eager", "compact_eager", *compiled)
        rates, note = rates_of("train stage", "own_step", *peers, "matrix_product")
        training = run.training_tables(params, folder, rates)
        tokens = params["optimizer"]["batch_size"] * params["model"]["block_size"]
        evaluation, _ = rates_of("evaluate_stage", "forward_eager")
        generation, _ = rates_of("generate_samples")
    generated = [rate * GENERATED for rate in generation["generate_samples"]]
    return "\n\n".join(
        [
            training,
            note,
            f"Peak memory of the train stage: {memory['peak_device_memory_mb']:,} MiB of the GPU's, "
            f"{memory['peak_memory_mb']:,} MiB of the host's.",
            run.rates_table(evaluation, tokens, "tokens/s"),
            f"Generation, one text at a time: {run.spread(generated, '{:,.0f}')} tokens/s.",
        ]
    )


def contender(name: str, folder: Path) -> Contender:
    if name == "train stage":
        return Contender(name, "stages.train", cwd=folder)
    return run.contender(name, folder)


if __name__ == "__main__":
    main()
