"""The progress line, and what TensorBoard and DVCLive draw while a model trains."""

import math
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from stages.common.errors import note, one_line
from stages.common.files import write_text
from stages.common.paths import LOGS
from stages.training.history import History
from stages.training.model_card import training_settings
from stages.training.module import LanguageModel, valid_metrics

from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from tqdm import tqdm

LIVE = LOGS / "dvclive"
# There while a training runs, so that DVC shows it live, and not in Git's way afterwards.
LIVE_DVC_YAML = "metrics:\n- metrics.json\nplots:\n- plots/metrics:\n    x: step\n"


class Live(Callback):
    """What a person follows while it trains: a progress line, TensorBoard and DVCLive.

    Every log_every_n_steps optimizer steps they get loss (the mean since the last time), lr,
    grad_norm and tokens_per_second, and after each validation its loss. Nothing depends on them.
    """

    def __init__(self, history: History):
        self.history, self.bar = history, None

    def shown(self, trainer: Trainer, module: LanguageModel) -> bool:
        users = trainer.progress_bar_callback is not None  # one of Lightning's, by class_path
        return module.settings.runtime.enable_progress_bar and trainer.is_global_zero and not users

    def on_train_start(self, trainer: Trainer, module: LanguageModel) -> None:
        steps = trainer.datamodule.planned_steps(trainer)
        show = self.shown(trainer, module)
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
            names = {"loss": "train_loss", "lr": "lr", "grad_norm": "grad_norm"}
            rows = [(row["step"], {name: row[key] for name, key in names.items()}) for row in self.history.train]
            rows += [(row["step"], valid_metrics(row["valid_loss"])) for row in self.history.valid]
            for logger in (each for each in trainer.loggers if isinstance(each, LiveLogger)):
                logger.log_all(rows)

    def on_train_batch_end(
        self, trainer: Trainer, module: LanguageModel, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
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

    def record(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, trainer.global_step)

    def on_validation_start(self, trainer: Trainer, module: LanguageModel) -> None:
        self.validation_started = time.monotonic()

    def on_validation_end(self, trainer: Trainer, module: LanguageModel) -> None:
        if trainer.sanity_checking or self.bar is None:
            return
        metrics = valid_metrics(module.valid_loss)
        self.record(trainer, metrics)
        self.valid = f", valid {module.valid_loss:.3f}"
        if self.shown(trainer, module):
            shown = f"valid_loss {metrics['valid_loss']:.4f}, valid_ppl {metrics['valid_ppl']:,.2f}"
            line = f"step {trainer.global_step:,}: {shown}"
            print(line, flush=True) if self.bar.disable else self.bar.write(line)
        self.since += time.monotonic() - self.validation_started

    def on_train_end(self, trainer: Trainer, module: LanguageModel) -> None:
        self.bar.close()

    def on_fit_end(self, trainer: Trainer, module: LanguageModel) -> None:  # after the last validation
        figures = {"tokens": self.history.tokens(trainer)}
        if self.history.valid:
            figures["best_valid_loss"] = min(row["valid_loss"] for row in self.history.valid)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):  # its HPARAMS tab
                logger.log_hyperparams(training_settings(module.settings), figures, trainer.global_step)

    def on_exception(self, trainer: Trainer, module: LanguageModel, exception: BaseException) -> None:
        if self.bar is not None:
            self.bar.close()


class LocalTensorBoard(TensorBoardLogger):
    """TensorBoard's logger without hparams.yaml: its HPARAMS tab has the settings, and to write that file,
    Lightning would load the clients of all cloud stores before the first step."""

    def save(self) -> None:
        self.experiment.flush()


class LiveLogger(Logger):
    """DVCLive, opened with the first figure, not before the first step: with DVC it takes as long as some steps.

    DVCLive's own logger for Lightning searches the call stack at each figure, and where that finds Lightning's own
    logging, reads all files again.
    """

    name = version = ""  # type: ignore[assignment]

    @cached_property
    def live(self) -> Any:
        """dvclive.Live, None where it doesn't work."""
        import dvclive

        try:
            return dvclive.Live(str(LIVE), save_dvc_exp=False, dvcyaml=False)
        except Exception as error:  # Git without a commit, no space for DVC's database: each fails in its own way
            note(f"DVCLive can't follow this training: {one_line(error)}")

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.log_all([(step, metrics)])

    def log_all(self, rows: list[tuple[int | None, dict[str, float]]]) -> None:
        """Figures by their steps; the summary, of the last ones, is written once."""
        if not rows or self.live is None:
            return
        for step, metrics in rows:
            self.live.step = step
            for name, value in metrics.items():
                self.live.log_metric(name, value)
        self.live.make_summary()
        if not (LIVE / "dvc.yaml").exists():
            write_text(LIVE / "dvc.yaml", LIVE_DVC_YAML)

    def log_hyperparams(self, *arguments: Any, **more: Any) -> None:
        """DVC knows the settings from params.yaml."""

    def finalize(self, status: str) -> None:
        if vars(self).get("live"):
            self.live.end()


def make_loggers(module: LanguageModel, identity: str, resume: Path | None) -> list[Logger]:
    """TensorBoard's and DVCLive's, for a run that starts or goes on from a checkpoint.

    Args:
        module: its settings and the model's shape name the run in TensorBoard.
        identity: of the run, so that a resumed one goes on in its folder.
        resume: the checkpoint.
    """
    step = resume.stem.split("-")[-1] if resume else "0"
    # TensorBoard hides what was logged after the checkpoint before: it happens again.
    first = int(step) + 1 if step.isdigit() else None
    config, optimizer, seed = module.model.config, module.settings.optimizer, module.settings.seed_everything
    name = f"{config.n_layer}x{config.n_embd}-{optimizer.name}-{optimizer.lr:g}-seed{seed}-{identity[:8]}"
    tensorboard = LocalTensorBoard(LOGS, name="", version=name, default_hp_metric=False, purge_step=first)
    if first is None:
        return [tensorboard]  # training has ended
    return [tensorboard, LiveLogger()]
