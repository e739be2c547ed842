"""What a training tells of itself: metrics/train.csv and valid.csv, live logs, the progress line, the summary."""

import json
import math
import platform
import resource
import sys
import time
from pathlib import Path

import dvclive
import pandas as pd
import pytorch_lightning as pl
import torch
import transformers
from dvclive.lightning import DVCLiveLogger
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.strategies import FSDPStrategy
from tqdm import tqdm

from stages.atomic import write_text
from stages.blocks import Split
from stages.checkpoints import Checkpoints
from stages.model_card import valid_figures
from stages.settings import UserError, first_reason

MODEL = Path("models/gpt2")
METRICS = Path("metrics")
LOGS = Path("logs")
LIVE = LOGS / "dvclive"
# There while a training runs, so that DVC shows it live, and not in Git's way afterwards.
LIVE_DVC_YAML = "metrics:\n- metrics.json\nplots:\n- plots/metrics:\n    x: step\n"
HISTORY_POINTS = 200


class History(Callback):
    """Loss, learning rate and gradient norm, at points that no logging setting moves; stops at NaN."""

    def __init__(self):
        self.train, self.valid, self.losses = [], [], []

    def on_train_start(self, trainer, module) -> None:
        steps = trainer.estimated_stepping_batches
        self.interval = max(1, math.ceil(steps / HISTORY_POINTS)) if math.isfinite(steps) else 100
        self.T, self.batch_size = module.settings.model.block_size, module.settings.optimizer.batch_size
        # Looking at a loss makes the host wait for a GPU or for other processes: there at the points only.
        self.each_step = module.device.type == "cpu" and trainer.world_size == 1
        self.losses = [loss.to(module.device) for loss in self.losses]  # a checkpoint's are on the CPU

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        step = trainer.global_step + 1
        if step % self.interval == 0 or step % trainer.log_every_n_steps == 0:
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            self.grad_norm = torch.nn.utils.get_total_norm(gradients)  # before they are clipped
            if isinstance(trainer.strategy, FSDPStrategy):  # each process holds a part of every gradient
                square = self.grad_norm.square().to(module.device)
                self.grad_norm = trainer.strategy.reduce(square, reduce_op="sum").sqrt()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.loss = outputs["loss"].detach() * trainer.accumulate_grad_batches
        self.losses.append(self.loss)
        stepped = (
            batch_idx + 1
        ) % trainer.accumulate_grad_batches == 0 or batch_idx + 1 == trainer.num_training_batches
        if self.each_step:
            self.check(trainer)
        if stepped and trainer.global_step % self.interval == 0:
            self.share(trainer)
            self.check(trainer)
            loss = torch.stack(self.losses).double().mean().item()
            self.train.append(
                {
                    "step": trainer.global_step,
                    "tokens": self.tokens(trainer),
                    "train_loss": loss,
                    "lr": trainer.optimizers[0].param_groups[0]["lr"],
                    "grad_norm": self.grad_norm.item(),
                }
            )
            self.losses = []

    def tokens(self, trainer) -> int:
        return trainer.fit_loop.epoch_loop.batch_progress.total.processed * self.T * self.batch_size

    def on_save_checkpoint(self, trainer, module, checkpoint: dict) -> None:
        if self.losses:
            self.share(trainer)
            self.check(trainer)  # a checkpoint made after it would never get past it
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def share(self, trainer) -> None:
        """Makes the losses the means over all processes, so that all of them, and any number of others, go on alike."""
        self.losses = list(trainer.strategy.reduce(torch.stack(self.losses), reduce_op="mean"))

    def check(self, trainer) -> None:
        if self.each_step and math.isfinite(self.losses[-1]):
            return
        finite = torch.isfinite(torch.stack(self.losses[-1:] if self.each_step else self.losses))
        if not finite.all():
            behind = len(finite) - int(finite.logical_not().nonzero()[0]) - 1
            step = trainer.global_step - behind // trainer.accumulate_grad_batches
            raise UserError(
                f"loss is not a finite number at step {step}: lower optimizer.lr, or set "
                "trainer.gradient_clip_val (checkpoints made before it are kept)"
            )

    def on_validation_end(self, trainer, module) -> None:
        if not trainer.sanity_checking:
            self.valid.append(
                {"step": trainer.global_step, "tokens": self.tokens(trainer), "valid_loss": module.valid_loss}
            )

    def state_dict(self) -> dict:
        return {"train": self.train, "valid": self.valid, "losses": [loss.cpu() for loss in self.losses]}

    def load_state_dict(self, state: dict) -> None:
        self.train, self.valid, self.losses = state["train"], state["valid"], state["losses"]

    def write(self, folder: Path) -> None:
        columns = {
            "train": ["step", "tokens", "train_loss", "lr", "grad_norm"],
            "valid": ["step", "tokens", "valid_loss"],
        }
        for name, rows in (("train", self.train), ("valid", self.valid)):
            write_text(folder / f"{name}.csv", pd.DataFrame(rows, columns=columns[name]).to_csv(index=False))


class Live(Callback):
    """What a person follows while it trains: a progress line, TensorBoard and DVCLive.

    Every log_every_n_steps optimizer steps they get loss (the mean since the last time), lr,
    grad_norm and tokens_per_second, and after each validation its loss. Nothing depends on them.
    """

    def __init__(self, history: History):
        self.history, self.bar = history, None

    def on_train_start(self, trainer, module) -> None:
        steps = trainer.estimated_stepping_batches
        show = module.settings.runtime.enable_progress_bar and trainer.is_global_zero
        self.bar = tqdm(
            total=steps if math.isfinite(steps) else None,
            initial=trainer.global_step,
            unit="step",
            desc="training",
            mininterval=0.5,
            disable=None if show else True,
            dynamic_ncols=True,
        )
        self.step = trainer.global_step
        self.losses, self.batches, self.valid, self.since = 0.0, 0, "", time.monotonic()
        if trainer.is_global_zero:
            # A resumed run starts DVCLive's files anew: what they got after its checkpoint comes again.
            for logger in trainer.loggers[1:]:
                for row in self.history.train:
                    metrics = {"loss": row["train_loss"], "lr": row["lr"], "grad_norm": row["grad_norm"]}
                    log_live(logger.experiment, metrics, row["step"])
                for row in self.history.valid:
                    log_live(logger.experiment, valid_metrics(row["valid_loss"]), row["step"])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.losses += self.history.loss
        self.batches += 1
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        self.bar.update()
        if self.step % trainer.log_every_n_steps:
            return
        loss = trainer.strategy.reduce(self.losses / self.batches, reduce_op="mean").item()
        tokens = self.batches * module.settings.optimizer.batch_size * module.settings.model.block_size
        now = time.monotonic()
        rate = tokens / (now - self.since)
        self.bar.set_postfix_str(f"loss {loss:.3f}{self.valid}, {rate:,.0f} tokens/s", refresh=False)
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        metrics = {"loss": loss, "lr": lr, "grad_norm": self.history.grad_norm.item(), "tokens_per_second": rate}
        self.record(trainer, metrics)
        self.losses, self.batches, self.since = 0.0, 0, now

    def record(self, trainer, metrics: dict[str, float]) -> None:
        if trainer.is_global_zero:
            tensorboard, *others = trainer.loggers
            tensorboard.log_metrics(metrics, trainer.global_step)
            for logger in others:
                log_live(logger.experiment, metrics, trainer.global_step)
                logger.experiment.make_summary()
                if not (LIVE / "dvc.yaml").exists():
                    write_text(LIVE / "dvc.yaml", LIVE_DVC_YAML)

    def on_validation_start(self, trainer, module) -> None:
        self.validation_started = time.monotonic()

    def on_validation_end(self, trainer, module) -> None:
        if trainer.sanity_checking or self.bar is None:
            return
        metrics = valid_metrics(module.valid_loss)
        self.record(trainer, metrics)
        self.valid = f", valid {module.valid_loss:.3f}"
        if module.settings.runtime.enable_progress_bar and trainer.is_global_zero:
            shown = f"valid_loss {metrics['valid_loss']:.4f}, valid_ppl {metrics['valid_ppl']:,.2f}"
            line = f"step {trainer.global_step:,}: {shown}"
            print(line, flush=True) if self.bar.disable else self.bar.write(line)
        self.since += time.monotonic() - self.validation_started

    def on_train_end(self, trainer, module) -> None:
        self.bar.close()

    def on_exception(self, trainer, module, exception) -> None:
        if self.bar is not None:
            self.bar.close()


def log_live(live: dvclive.Live, metrics: dict[str, float], step: int) -> None:
    """What DVCLiveLogger.log_metrics does, but for its search of the call stack, and, where that finds
    Lightning's own logging, its reading all files again."""
    live.step = step
    for name, value in metrics.items():
        live.log_metric(name, value)


def valid_metrics(loss: float) -> dict[str, float]:
    return {"valid_loss": loss, "valid_ppl": math.exp(min(loss, 700.0))}


def make_loggers(identity: str, resume: Path | None) -> list[Logger]:
    """TensorBoard's and, where it works, DVCLive's, for a run that starts or goes on from a checkpoint."""
    step = resume.stem.removeprefix("step-") if resume else "0"
    # TensorBoard hides what was logged after the checkpoint before: it happens again.
    first = int(step) + 1 if step.isdigit() else None
    tensorboard = TensorBoardLogger(LOGS, name="", version=identity[:16], default_hp_metric=False, purge_step=first)
    if first is None:
        return [tensorboard]  # training has ended
    logger = DVCLiveLogger(dir=str(LIVE), save_dvc_exp=False, report=None, dvcyaml=False)
    try:
        logger.experiment  # noqa: B018 (it opens Git and DVC)
    except Exception as error:  # Git without a commit, no space for DVC's database: each fails in its own way
        print(f"note: DVCLive can't follow this training: {first_reason(str(error))}", file=sys.stderr)
        return [tensorboard]
    return [tensorboard, logger]


def write_run_figures(processes: int, checkpoints: Checkpoints, history: History) -> dict:
    """metrics/run.json: what differs between two runs of the same inputs."""
    cuda = torch.cuda.is_available()
    tokens = history.train[-1]["tokens"] if history.train else 0
    figures = {
        "run": checkpoints.folder.name,
        "train_seconds": round(checkpoints.seconds, 1),
        "tokens_per_second": round(tokens / (checkpoints.seconds - checkpoints.validation_seconds)),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "peak_device_memory_mb": round(torch.cuda.max_memory_allocated() / 2**20) if cuda else 0,
        "processes": processes,
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pytorch_lightning": pl.__version__,
        "transformers": transformers.__version__,
    }
    write_text(METRICS / "run.json", json.dumps(figures, indent=2) + "\n")
    return figures


def print_summary(checkpoints: Checkpoints, valid: Split, figures: dict, tensorboard: str) -> None:
    minutes, seconds = divmod(round(figures["train_seconds"]), 60)
    rows = {
        "time": f"{minutes} min {seconds} s",
        "tokens/s": f"{figures['tokens_per_second']:,}",
        "model": MODEL,
        "loss curves": f"{METRICS}/train.csv and valid.csv; tensorboard --logdir {tensorboard}",
    }
    if checkpoints.best_step is not None:
        best = valid_figures(checkpoints.best_loss, valid)
        rows = {
            "best step": f"{checkpoints.best_step:,} of {checkpoints.steps:,}",
            "valid loss": f"{best['loss']:.4f}",
            "valid ppl": f"{best['ppl']:,.2f}",
            "bits per byte": f"{best['bits_per_byte']:.4f}",
        } | rows
    print("\n".join(f"{name:15}{value}" for name, value in rows.items()), flush=True)
