"""What a training says of itself: its first and last lines in the terminal, and metrics/run.json."""

import math
import platform
from pathlib import Path

from stages.common.errors import note
from stages.common.files import write_json
from stages.common.memory import peak_memory
from stages.common.paths import METRICS, MODEL
from stages.model import ops
from stages.text.streams import Split
from stages.training.checkpoints import Checkpoints, step_of
from stages.training.data import Blocks
from stages.training.history import History
from stages.training.model_card import valid_figures
from stages.training.module import LanguageModel
from stages.watch.progress import LIVE

import pytorch_lightning as pl
import torch
import transformers


def print_start(trainer: pl.Trainer, module: LanguageModel, blocks: Blocks, resume: Path | None) -> None:
    """What is trained, and from where it goes on."""
    steps = blocks.planned_steps(trainer)
    print(plan_line(trainer, module.model.num_parameters(), blocks), flush=True)
    optimizer = module.settings.optimizer
    if optimizer.num_training_steps and optimizer.num_training_steps < steps:
        note(f"optimizer.num_training_steps: {optimizer.num_training_steps:,}: later steps have the lowest rate")
    if optimizer.num_training_steps and optimizer.num_warmup_steps >= steps:
        note(f"optimizer.num_warmup_steps: {optimizer.num_warmup_steps:,}: the training ends before its warm-up does")
    if resume and resume.name.startswith("trunk"):
        rest = f"{steps - step_of(resume):,} steps to train in place of {steps:,}"
        print(f"going on from step {step_of(resume):,} of the trunk: {rest}", flush=True)
    elif resume:
        print(f"going on from {resume}", flush=True)


def plan_line(trainer: pl.Trainer, parameters: int, blocks: Blocks) -> str:
    """What is about to be trained; it has no end where only the clock or a callback ends it."""
    tokens, steps = len(blocks.train.tokens), blocks.planned_steps(trainer)
    length = f"{steps:,} steps of {blocks.step_tokens(trainer):,}, {blocks.planned_epochs(trainer):.3g} epochs"
    model = f"GPT-2 with {parameters:,} parameters on {tokens:,} tokens, {tokens / parameters:.2g} each"
    return f"{model}: {length if math.isfinite(steps) else 'no end'}, {blocks.settings.trainer.precision}"


def write_run_figures(trainer: pl.Trainer, parameters: int, checkpoints: Checkpoints, history: History) -> dict:
    """metrics/run.json: what the training cost, and what differs between two runs of the same inputs."""
    cuda = torch.cuda.is_available()
    tokens = max((row["tokens"] for row in (*history.train, *history.valid)), default=0)
    figures = {
        "run": checkpoints.folder.name,
        "parameters": parameters,
        "tokens": tokens,
        "train_seconds": round(checkpoints.seconds, 1),
        "tokens_per_second": round(tokens / (checkpoints.seconds - checkpoints.validation_seconds)),
        "peak_memory_mb": round(peak_memory() / 2**20),
        "peak_device_memory_mb": round(torch.cuda.max_memory_allocated() / 2**20) if cuda else 0,
        "processes": trainer.world_size,
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "processor": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "float32_products": "oneDNN" if ops.ONEDNN else "PyTorch",
        "precision": trainer.precision,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pytorch_lightning": pl.__version__,
        "transformers": transformers.__version__,
    }
    (LIVE / "dvc.yaml").unlink(missing_ok=True)
    write_json(METRICS / "run.json", figures)
    return figures


def print_summary(checkpoints: Checkpoints, valid: Split, figures: dict, tensorboard: str) -> None:
    """What a training took and how good its best weights are, in the terminal."""
    minutes, seconds = divmod(round(figures["train_seconds"]), 60)
    rows = {}
    if checkpoints.best.step is not None:
        best = valid_figures(checkpoints.best, valid)
        rows = {
            "best step": f"{checkpoints.best.step:,} of {checkpoints.steps:,}",
            "valid loss": f"{best['loss']:.4f}",
            "valid ppl": f"{best['ppl']:,.2f}",
        }
        if "bits_per_byte" in best:
            rows["bits per byte"] = f"{best['bits_per_byte']:.4f}"
    rows |= {
        "time": f"{minutes} min {seconds} s",
        "tokens/s": f"{figures['tokens_per_second']:,}",
        "model": MODEL,
        "loss curves": f"{METRICS}/train.csv and valid.csv; tensorboard --logdir {tensorboard}",
    }
    print("\n".join(f"{name:15}{value}" for name, value in rows.items()), flush=True)
