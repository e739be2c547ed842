"""What a training will take, before it begins: parameters, tokens, steps, minutes, memory, disk.

python -m tools.plan --trainer.max_epochs 10

It trains for a few steps with the settings as they are, times five of them or more, and keeps nothing.
"""

import math
import shutil
import sys
import time
from typing import Any

from stages.common.errors import run
from stages.common.memory import peak_memory
from stages.common.params import load
from stages.common.paths import BLOCKS
from stages.common.settings import Settings
from stages.model import ops
from stages.text.streams import Split, load_split
from stages.train import first_model
from stages.training.best import BestWeights
from stages.training.checkpoints import KEPT
from stages.training.data import Blocks, limited
from stages.training.history import History
from stages.training.module import LanguageModel
from stages.training.sharded import module_of
from stages.training.trainer import changed, check_processes, make_trainer, on_this_machine, quiet_libraries
from stages.watch.summary import plan_line

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

WARM = 3  # steps that take longer: memory is found, kernels are made
TIMED, SECONDS = 5, 2.0  # at least so many steps, for at least so long
VALIDATED = 4  # batches
COMPILING, SAVED = 10.0, {"cpu": 0.2, "cuda": 0.5}  # seconds it takes at least; the share of a step it saves at most


def main() -> None:
    settings = on_this_machine(load("tools.plan", __doc__))
    quiet_libraries()
    ops.reuse_memory()
    train, valid = load_split("train"), load_split("valid")
    libraries = peak_memory()
    model = first_model(settings, train)
    trial, trainer = tried(settings, model, train, valid)
    if trainer.is_global_zero:
        parameters, weights = model.num_parameters(), 4 * model.num_parameters()
        print(plan_line(trainer, parameters, trainer.datamodule))
        print(f"minutes   {minutes(trial, trainer)}")
        print(f"memory    {memory(trial, trainer, weights, libraries)}")
        trunks = settings.runtime.keep_trunks if settings.optimizer.schedule == "wsd" else 0
        print(f"disk      {disk(trial, weights, trunks)}", flush=True)
        for line in odd_choices(settings, model.config, parameters, train, trial.epochs):
            print(f"note: {line}", file=sys.stderr)
    planned = seconds(trial, trainer)
    if may_compile(settings, trainer, planned):
        compiled, trainer = tried(changed(settings, "model", compile=True), model, train, valid)
        if seconds(compiled, trainer) < planned:
            said = minutes(compiled, trainer, unit=" minutes")
            print(f"note: model.compile: true would take {said}: set it", file=sys.stderr)


def tried(settings: Settings, model: GPT2LMHeadModel, train: Split, valid: Split) -> tuple["Trial", Trainer]:
    """Some steps of a training, and a validation."""
    # Without the users' callbacks: they may write files, or end it sooner.
    limit = settings.trainer.overfit_batches or settings.trainer.limit_val_batches
    few = 0 if limit == 0 else VALIDATED
    settings = changed(settings, "trainer", callbacks=None, min_epochs=None, min_steps=None, limit_val_batches=few)
    trial, blocks, module = Trial(limit), Blocks(train, valid, settings), module_of(model, settings)
    trainer = make_trainer(settings, BestWeights(), [History(), trial])
    check_processes(trainer, settings)
    trainer.precision_plugin.convert_module(module)
    trainer.fit(module, datamodule=blocks)
    return trial, trainer


def may_compile(settings: Settings, trainer: Trainer, planned: float) -> bool:
    """Whether so long a training could gain by it, and it works here: only then is it worth a trial."""
    kind = trainer.strategy.root_device.type
    compiler = kind == "cuda" or shutil.which("g++") is not None
    asked = settings.model.compile or trainer.world_size > 1
    return compiler and not asked and COMPILING < SAVED.get(kind, 0.0) * planned < math.inf


class Trial(Callback):
    """Times steps and a validation, and ends the training after them."""

    def __init__(self, limit: float | None):
        self.limit = limit  # of the batches of a validation

    def on_train_start(self, trainer: Trainer, module: LanguageModel) -> None:
        self.planned = trainer.datamodule.planned_steps(trainer)
        self.epochs = trainer.datamodule.planned_epochs(trainer)
        self.marks, self.validation = [now(trainer)], 0.0  # seconds: between two steps; of the last validation

    def on_train_batch_end(
        self, trainer: Trainer, module: LanguageModel, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        if trainer.global_step == len(self.marks):
            self.marks.append(now(trainer))
            enough = len(self.marks) > WARM + TIMED and self.marks[-1] - self.marks[WARM] >= SECONDS
            trainer.should_stop |= trainer.strategy.reduce_boolean_decision(enough)  # each has its own clock

    def on_validation_start(self, trainer: Trainer, module: LanguageModel) -> None:
        self.started = now(trainer)

    def on_validation_end(self, trainer: Trainer, module: LanguageModel) -> None:
        self.validation = now(trainer) - self.started
        self.marks = [mark + self.validation for mark in self.marks]  # it is no part of a step

    def on_train_end(self, trainer: Trainer, module: LanguageModel) -> None:
        states = trainer.optimizers[0].state.values()
        self.optimizer = sum(value.nbytes for state in states for value in state.values() if torch.is_tensor(value))


def now(trainer: Trainer) -> float:
    """Seconds, once the device has done what it was given."""
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def minutes(trial: Trial, trainer: Trainer, unit: str = "") -> str:
    step, (validations, each) = step_seconds(trial), validating(trial, trainer)
    if math.isinf(trial.planned):
        return f"no end but trainer.max_time or a callback's: steps of {step:.3g} s"
    steps = f"{trial.planned:,} steps of {step:.3g} s, {validations} validations of {each:.3g} s"
    return f"{seconds(trial, trainer) / 60:,.2f}{unit}: {steps}"


def seconds(trial: Trial, trainer: Trainer) -> float:
    """What the whole training takes, with its first, slower steps."""
    warm, (validations, each) = warm_steps(trial), validating(trial, trainer)
    return trial.marks[warm] - trial.marks[0] + (trial.planned - warm) * step_seconds(trial) + validations * each


def warm_steps(trial: Trial) -> int:
    return min(WARM, len(trial.marks) - 2)


def step_seconds(trial: Trial) -> float:
    marks, warm = trial.marks, warm_steps(trial)
    return (marks[-1] - marks[warm]) / (len(marks) - 1 - warm)


def validating(trial: Trial, trainer: Trainer) -> tuple[int, float]:
    """How often a training is validated, and the seconds of each time."""
    batches = trial.planned * trainer.accumulate_grad_batches / (trainer.check_val_every_n_epoch or 1)
    if not trial.validation or not math.isfinite(batches):
        return 0, 0.0
    blocks, tried = trainer.datamodule, sum(trainer.num_val_batches)
    each = trial.validation * limited(blocks.all_valid_batches, trial.limit) / trainer.world_size / tried
    return math.ceil(batches / trainer.val_check_batch), each


def memory(trial: Trial, trainer: Trainer, weights: int, libraries: int) -> str:
    """The peak: what the trial took, and the exported weights, which a training loads once more at its end."""
    peak = peak_memory() + weights
    if trainer.strategy.root_device.type == "cuda":
        return f"{mib(torch.cuda.max_memory_allocated())} on the device, {mib(peak)} beside it"
    parts = {"libraries": libraries, "weights, gradients, best, exported": 4 * weights, "optimizer": trial.optimizer}
    parts["activations"] = max(0, peak - sum(parts.values()))
    return f"{mib(peak)}: " + ", ".join(f"{name} {mib(part)}" for name, part in parts.items())


def disk(trial: Trial, weights: int, trunks: int) -> str:
    checkpoint = 2 * weights + trial.optimizer
    blocks = sum(file.stat().st_size for file in BLOCKS.iterdir())
    kept = f" and up to {mib(trunks * checkpoint)} after it (runtime.keep_trunks)" if trunks else ""
    checkpoints = f"checkpoints {mib((KEPT + 1 + trunks) * checkpoint)} while it trains{kept}"
    return f"blocks {mib(blocks)}, {checkpoints}, DVC's cache {mib(weights)} a run"


def mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def usual_lr(optimizer: str, width: int, parameters: int) -> float:
    """The learning rate to start from.

    AdamW: 0.003239 - 0.0001395 ln N (Kaplan et al. 2020, https://arxiv.org/abs/2001.08361, appendix D.6).
    Muon: steps of spectral norm 0.02 (Jordan 2024, https://kellerjordan.github.io/posts/muon/), 0.2 sqrt(width) lr.
    """
    return 0.1 / math.sqrt(width) if optimizer == "muon" else max(1e-4, 0.003239 - 0.0001395 * math.log(parameters))


def odd_choices(settings: Settings, config: GPT2Config, parameters: int, train: Split, epochs: float) -> list[str]:
    """What seldom serves such a text and such a model, a line each: what, and what to do."""
    tokens, model, new = len(train.tokens), settings.model, not settings.model.from_pretrained
    name, lr = settings.optimizer.name, settings.optimizer.lr
    usual = usual_lr(name, config.n_embd, parameters) * (1 if new else 0.1)
    vocabulary, length = config.vocab_size * config.n_embd / parameters, tokens / max(train.documents, 1)
    few, entries = tokens < parameters / 10, f"{config.vocab_size:,} entries"
    odd = {
        f"model: {parameters:,} parameters learn {tokens:,} tokens by heart: take fewer": few and new,
        f"tokenizer.vocab_size: {entries} take {vocabulary:.0%} of the parameters: lower it": vocabulary > 0.6 and new,
        f"model.block_size: documents have {length:,.0f} tokens on average: lower it": model.block_size > 2 * length,
        f"optimizer.lr: {lr:g}, but {name} takes about {usual:.0e} here: try it": not usual / 5 <= lr <= usual * 5,
        f"trainer: {epochs:,.0f} epochs: try model.dropout 0.1": 10 <= epochs < math.inf and not model.dropout,
    }
    return [line for line, is_odd in odd.items() if is_odd]


if __name__ == "__main__":
    run(main)
