"""Lightning's Trainer with our settings, and what it must be told or must not be allowed."""

import logging
import os
import shutil
import warnings
from typing import Any

from stages.common.devices import auto_precision
from stages.common.errors import UserError
from stages.common.params import first_reason, trainer_parser
from stages.common.settings import Settings, as_list
from stages.training import lightning_internals as internals
from stages.training.checkpoints import AtomicCheckpointIO
from stages.training.data import schedule_of
from stages.training.sharded import ShardedStrategy

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException

# Lightning's callbacks and plugins that can't keep the promises (docs/reliability.md), and what to set instead.
REFUSED = {
    "LearningRateFinder": "the rate is optimizer.lr: `dvc exp run -S optimizer.lr=...` tries others",
    "BatchSizeFinder": "the batch is optimizer.batch_size: `dvc exp run -S optimizer.batch_size=...` tries others",
    "ModelPruning": "its masks are no part of a GPT-2, so no weight of the exported model would be gone: remove it",
    "BaseFinetuning": "GPT-2 has no backbone apart from its head, and all of it is trained: remove it",
    "OnExceptionCheckpoint": "a stopped training has its own checkpoint: set runtime.checkpoint_every_n_minutes",
    "SpikeDetection": "it can't go on in a resumed run: set EarlyStopping's divergence_threshold",
    "CheckpointIO": "the train stage writes checkpoints itself, whole or not at all: remove it",
    "StochasticWeightAveraging": "its average is never validated and lost in a resumed run: use EMAWeightAveraging",
}
METRIC_NAMES = ("loss", "valid_loss", "valid_ppl")


def on_this_machine(settings: Settings) -> Settings:
    """The settings with what trainer.precision: auto stands for here, which is part of what the run is."""
    if settings.trainer.precision != "auto":
        return settings
    return changed(settings, "trainer", precision=auto_precision(settings.trainer.accelerator))


def changed(settings: Settings, group: str, **values: Any) -> Settings:
    """The settings with other ones in a group."""
    return settings.model_copy(update={group: getattr(settings, group).model_copy(update=values)})


def make_trainer(settings: Settings, first: Callback, last: list[Callback]) -> pl.Trainer:
    """Lightning's Trainer with the settings of the trainer and runtime groups.

    Args:
        settings: of the train stage.
        first, last: callbacks of our own, before and after the users'.
    Raises:
        UserError: what Lightning, a callback or `check_refused` refuses.
    """
    try:
        config = trainer_parser().parse_object({"trainer": settings.trainer.model_dump()})
        arguments = trainer_parser().instantiate(config).trainer.as_dict()
        users, plugins = as_list(arguments.pop("callbacks")), as_list(arguments.pop("plugins"))
        loggers = arguments.pop("logger")
        if arguments["strategy"] == "fsdp":
            arguments["strategy"] = ShardedStrategy()
        check_refused("callbacks", users)
        check_refused("plugins", plugins)
        trainer = pl.Trainer(
            **arguments,
            callbacks=[first, *users, *last],
            plugins=[*plugins, AtomicCheckpointIO()],
            logger=loggers or False,  # make_loggers, which has to know the checkpoint, adds ours
            log_every_n_steps=settings.runtime.log_every_n_steps,
            profiler=settings.runtime.profiler or internals.NoProfiler(),
            num_sanity_val_steps=settings.runtime.num_sanity_val_steps,
            enable_progress_bar=any(isinstance(c, pl.callbacks.ProgressBar) for c in users),  # else Live has one
            enable_model_summary=any(isinstance(c, pl.callbacks.ModelSummary) for c in users),
            enable_checkpointing=any(isinstance(callback, pl.callbacks.ModelCheckpoint) for callback in users),
            use_distributed_sampler=False,  # ShuffledBatches shares the work out itself
        )
        if trainer.limit_val_batches:
            trainer.limit_val_batches = 1.0  # it would be of each process: Blocks limits what all of them share
        return trainer
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        # Lightning and the users' callbacks check their arguments in their own ways.
        raise UserError(f"trainer: {first_reason(str(error))}: change the trainer group") from None


def check_refused(key: str, users: list[Any]) -> None:
    """Raises UserError for a callback or plugin that can't keep the promises, or watches a figure that isn't there."""
    for user in users:
        name = type(user).__name__
        for kind in type(user).__mro__:
            if kind.__name__ in REFUSED:
                raise UserError(f"trainer.{key}: {name}: {REFUSED[kind.__name__]}")
        late = {key: getattr(user, key, None) for key in ("update_starting_at_step", "update_starting_at_epoch")}
        if any(late.values()) and isinstance(user, pl.callbacks.WeightAveraging):
            raise UserError(
                f"trainer.{key}: {name}: {next(filter(late.get, late))}: until then the untrained model "
                "would be validated and exported: leave it out"
            )
        monitor = getattr(user, "monitor", None)
        if monitor is not None and monitor not in METRIC_NAMES:
            raise UserError(f"trainer.{key}: {name} monitors {monitor!r}: the metrics are {', '.join(METRIC_NAMES)}")


def check_processes(trainer: pl.Trainer, settings: Settings) -> None:
    """Raises UserError when the settings don't fit each other or the processes that were started."""
    strategy, processes = trainer.strategy, trainer.num_devices * trainer.num_nodes
    optimizer = settings.optimizer
    if settings.model.compile and strategy.root_device.type == "cpu" and not shutil.which("g++"):
        raise UserError("model.compile: true needs the C++ compiler g++ on a CPU: install it, or set it to false")
    environment = internals.cluster_environment(trainer)
    if environment.creates_processes_externally and environment.world_size() != processes:
        raise UserError(
            f"trainer.devices {trainer.num_devices} on trainer.num_nodes {trainer.num_nodes} are {processes} "
            f"processes, but {environment.world_size()} were started: make them equal"
        )
    if trainer.num_nodes > 1 and not environment.creates_processes_externally and "NODE_RANK" not in os.environ:
        raise UserError(
            f"trainer.num_nodes: {trainer.num_nodes}, but nothing started this stage on each of them: "
            "start it with torchrun or srun (docs/scale.md), or set it to 1"
        )
    if optimizer.batch_size % processes:
        raise UserError(f"optimizer.batch_size: {optimizer.batch_size} can't be shared evenly by {processes} processes")
    # What is spawned hands its state back to nobody, and of others nothing is known.
    if internals.is_spawned(strategy) or not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ShardedStrategy):
        raise UserError(
            f"trainer.strategy: {type(strategy).__name__} of this kind can't be used: set auto, ddp or fsdp"
        )
    averages = [c for c in trainer.callbacks if isinstance(c, pl.callbacks.WeightAveraging)]
    if averages and isinstance(strategy, ShardedStrategy):
        raise UserError(f"trainer.callbacks: {type(averages[0]).__name__} needs whole weights: set strategy ddp")
    if schedule_of(trainer) and settings.trainer.accumulate_grad_batches != 1:
        raise UserError("trainer.accumulate_grad_batches: GradientAccumulationScheduler says it: set it to 1")
    internals.keep_buckets(strategy)


def quiet_libraries() -> None:
    """Advice on choices that this stage has made on purpose would hide what the user must see."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for asked in ("callbacks", "profilers"):  # what a user has asked for says what it has to say
        logging.getLogger(f"pytorch_lightning.{asked}").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", message="The `srun` command is available.*")  # one process needs no launcher
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*dataloader is not resumable.*")
    warnings.filterwarnings("ignore", message=".*log_every_n_steps.*")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
