"""Every private or undocumented thing of Lightning that is leaned on, each with its reason.

tests/training/test_lightning_internals.py fails when an upgrade takes one away. Those of torch stand in
stages/model/ops.py (`mkldnn._linear_pointwise`, `mallopt`) and are held by the same test, and in
stages/common/checkpoint_files.py (what torch.distributed.checkpoint pickles), held by test_parts.py.
"""

from contextlib import nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.profilers import PassThroughProfiler
from pytorch_lightning.strategies import DDPStrategy, Strategy
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher


class NoProfiler(PassThroughProfiler):
    """Lightning enters 80 of these contexts a step; its own are generators, a tenth of a millisecond in all."""

    nothing = nullcontext()

    def profile(self, action_name: str) -> Any:
        return self.nothing


def begin_batch_again(trainer: pl.Trainer) -> None:
    """A checkpoint is made as a batch is about to begin, which Lightning has counted already: it begins again."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.total
    batches.ready = batches.started = batches.completed


def batches_done(trainer: pl.Trainer) -> int:
    """Batches of this epoch that are done; no public counter knows of those before a resume."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.completed


def batches_seen(trainer: pl.Trainer) -> int:
    """Batches of the whole training that are done, whatever the epochs."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed


def batches_begun(trainer: pl.Trainer) -> int:
    """The number of this batch in the whole training, from 0, as `val_check_interval` without epochs counts it."""
    return trainer.fit_loop.epoch_loop.total_batch_idx


def steps_after(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether the optimizer steps after this batch of an epoch."""
    done = batch_idx + 1
    return done % trainer.accumulate_grad_batches == 0 or done == trainer.num_training_batches


def repeat_epoch_start(trainer: pl.Trainer) -> None:
    """Calls `on_train_epoch_start` of callbacks that keep no state, where a run goes on inside an epoch.

    Lightning leaves the hook out then (Lightning-AI/pytorch-lightning, loops/fit_loop.py, on_advance_start), and
    what such a callback has set, like GradientAccumulationScheduler the batches a step, would be gone. One that
    has a state_dict has its state back from the checkpoint.
    """
    if not trainer.fit_loop.restarted_mid_epoch:
        return
    for callback in trainer.callbacks:
        stateless = type(callback).state_dict is Callback.state_dict
        if stateless and type(callback).on_train_epoch_start is not Callback.on_train_epoch_start:
            callback.on_train_epoch_start(trainer, trainer.lightning_module)


def validate(trainer: pl.Trainer) -> None:
    """Runs a whole validation at this point of a training, as Lightning does between two batches."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True


def validation_follows(trainer: pl.Trainer, batch_idx: int, steps: float) -> bool:
    """Whether the optimizer step that begins is the last one before a validation.

    Args:
        steps: of the whole training.
    """
    interval = trainer.val_check_batch
    first = batch_idx if trainer.check_val_every_n_epoch else batches_begun(trainer)
    last = min(first + trainer.accumulate_grad_batches, first - batch_idx + trainer.num_training_batches)
    return trainer.global_step + 1 >= steps or isinstance(interval, int) and last // interval > first // interval


def put_metrics_back(trainer: pl.Trainer, metrics: dict[str, float]) -> None:
    """What was logged before a resume: a callback may look at it before it is logged again."""
    trainer._logger_connector._callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})


def cluster_environment(trainer: pl.Trainer) -> ClusterEnvironment:
    """Who started the processes; Trainer has no public name for it."""
    return trainer._accelerator_connector.cluster_environment


def is_spawned(strategy: Strategy) -> bool:
    """Whether the processes of a strategy are spawned or forked from this one."""
    return isinstance(strategy.launcher, _MultiProcessingLauncher)


def keep_buckets(strategy: Strategy) -> None:
    """DDP lays its buckets of gradients out anew after the first step, so that a resumed run would sum its
    first step in another order; looking for unused parameters, it never does."""
    if isinstance(strategy, DDPStrategy):
        strategy._ddp_kwargs["find_unused_parameters"] = True


def clips_itself(optimizer: Any) -> None:
    """Under mixed precision Lightning clips no gradients of an optimizer that says it unscales them itself,
    as PyTorch's fused AdamW does."""
    optimizer._step_supports_amp_scaling = False


class QuickAttributes(pl.LightningModule):
    """Lightning sets `_current_fx_name` 40 times a step, and a Module first looks for parameters of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)
