"""Makes models/gpt2/: a GPT-2 trained with PyTorch Lightning, at its best validation loss.

Interrupted, it goes on from its last checkpoint in models/checkpoints/ at the next run with the
same settings and data.
"""

import hashlib
import json
import logging
import math
import os
import platform
import re
import resource
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
import transformers
from dvclive.lightning import DVCLiveLogger
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from stages import gpt2
from stages.atomic import new_folder, write_text
from stages.blocks import Split, load_split, load_tokenizer
from stages.checkpoints import AtomicCheckpointIO, Checkpoints, Interrupted, training_lock
from stages.model_card import model_card, valid_figures
from stages.settings import OneProcessError, UserError, first_reason, load, make_parser, run

TOKENIZER = Path("models/tokenizer")
MODEL = Path("models/gpt2")
METRICS = Path("metrics")
LOGS = Path("logs")
LIVE = LOGS / "dvclive"
# There while a training runs, so that DVC shows it live, and not in Git's way afterwards.
LIVE_DVC_YAML = "metrics:\n- metrics.json\nplots:\n- plots/metrics:\n    x: step\n"
HISTORY_POINTS = 200
METRIC_NAMES = ("loss", "valid_loss", "valid_ppl")


def main() -> None:
    parser = make_parser("train", __doc__)
    settings = load(parser)
    quiet_libraries()
    train_split, valid_split = load_split("train"), load_split("valid")
    tokenizer, end_of_text, fingerprint = load_tokenizer(TOKENIZER)
    for split in (train_split, valid_split):
        if split.tokenizer != fingerprint:
            raise UserError("data/blocks was made by another tokenizer than models/tokenizer: run `dvc repro`")
    T, batch_size = settings.model.block_size, settings.optimizer.batch_size
    if len(train_split.tokens) <= T:
        raise UserError(
            f"model.block_size: {T} is more than the {len(train_split.tokens) - 1:,} tokens to predict in train"
        )
    if (len(train_split.tokens) - 1) // T < batch_size:
        raise UserError(
            f"optimizer.batch_size: train has only {(len(train_split.tokens) - 1) // T:,} blocks of "
            f"model.block_size {T}, less than one batch of {batch_size}: lower one of them"
        )
    batches, interval = (len(train_split.tokens) - 1) // T // batch_size, settings.trainer.val_check_interval
    if isinstance(interval, int) and interval > batches and settings.trainer.check_val_every_n_epoch is not None:
        raise UserError(
            f"trainer.val_check_interval: {interval} is more than the {batches:,} batches of an epoch: "
            "lower it, or set trainer.check_val_every_n_epoch: null"
        )

    pl.seed_everything(settings.seed_everything, workers=True, verbose=False)
    if settings.model.from_pretrained is None:
        model = gpt2.new_model(settings.model, train_split.vocab_size, end_of_text)
    else:
        model = gpt2.pretrained_model(settings.model, tokenizer.get_vocab(), end_of_text)

    identity = run_identity(settings, parser, train_split, valid_split)
    checkpoints = Checkpoints(identity, fingerprint, settings.runtime)
    history = History()
    module = LanguageModel(model, settings)
    try:
        trainer = make_trainer(parser, settings, [history, Live(history), checkpoints])
        if settings.model.compile and trainer.strategy.root_device.type == "cpu" and not shutil.which("g++"):
            raise UserError("model.compile: true needs the C++ compiler g++ on a CPU: install it, or set it to false")
        module.loss_is_monitored = any(getattr(c, "monitor", None) == "loss" for c in trainer.callbacks)
        check_processes(trainer, settings.optimizer)
        checkpoints.lock = training_lock() if trainer.is_global_zero else None
        resume = checkpoints.newest(trainer)
        trainer.loggers = make_loggers(identity, resume)
        parameters = sum(p.numel() for p in model.parameters())
        if trainer.is_global_zero:
            print(f"GPT-2 with {parameters:,} parameters on {len(train_split.tokens):,} tokens", flush=True)
            if resume:
                print(f"going on from {resume}", flush=True)
        if resume == checkpoints.final:
            checkpoints.load_final(history)
        else:
            blocks = Blocks(train_split, valid_split, T, batch_size, settings)
            trainer.fit(module, datamodule=blocks, ckpt_path=resume, weights_only=True)
    except MisconfigurationException as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from None
    except RuntimeError as error:
        # Gloo says it in a plain RuntimeError; a process that waits in NCCL is ended by its launcher.
        if not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        if trainer.global_rank:
            sys.exit(1)
        if trainer.strategy.launcher:
            trainer.strategy.launcher.kill(signal.SIGKILL)
        why = re.sub(r"^\[.*?\] ", "", str(error).strip().split("\n")[0]).split(". ")[0]
        raise UserError(
            f"one of the {trainer.world_size} processes of this training has ended, or can't be reached ({why}): "
            "`dvc repro` goes on from the last checkpoint"
        ) from None
    except Interrupted as error:
        if trainer.global_rank:
            sys.exit(0)  # all have stopped together, and Lightning would kill the first one for another's failure
        print(f"stopped by {error.signal.name} at step {trainer.global_step:,}: `dvc repro` goes on", file=sys.stderr)
        sys.exit(128 + error.signal)
    except SIGTERMException:  # Lightning's own, before the first step
        sys.exit(128 + signal.SIGTERM)

    if trainer.is_global_zero:
        with new_folder(MODEL) as folder:
            checkpoints.export(model, folder)
            for file in sorted(TOKENIZER.iterdir()):
                shutil.copy(file, folder / file.name)
            best = checkpoints.best_step, checkpoints.best_loss
            card = model_card(settings, parameters, train_split, valid_split, checkpoints.steps, *best)
            card.save(folder / "README.md")
        history.write(METRICS)
        figures = write_run_figures(trainer.world_size, checkpoints, history)
        (LIVE / "dvc.yaml").unlink(missing_ok=True)
        print_summary(checkpoints, valid_split, figures, trainer.loggers[0].log_dir)
    trainer.strategy.barrier("exported")


def make_trainer(parser, settings, callbacks: list[Callback]) -> pl.Trainer:
    """Lightning's Trainer with the settings of the trainer and runtime groups."""
    try:
        arguments = parser.instantiate(settings).trainer.as_dict()
        users = arguments.pop("callbacks") or []
        users = users if isinstance(users, list) else [users]
        check_monitors(users)
        plugins = arguments.pop("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        return pl.Trainer(
            **arguments,
            callbacks=[*users, *callbacks],
            plugins=[*plugins, AtomicCheckpointIO()],
            logger=False,  # make_loggers has to know the checkpoint
            log_every_n_steps=settings.runtime.log_every_n_steps,
            profiler=settings.runtime.profiler,
            num_sanity_val_steps=settings.runtime.num_sanity_val_steps,
            enable_progress_bar=False,  # Live has one
            enable_model_summary=False,
            enable_checkpointing=any(isinstance(callback, pl.callbacks.ModelCheckpoint) for callback in users),
            use_distributed_sampler=False,  # ShuffledBatches shares the work out itself
        )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        # Lightning and the users' callbacks check their arguments in their own ways.
        raise UserError(f"trainer: {first_reason(str(error))}: change the trainer group") from None


def check_processes(trainer: pl.Trainer, optimizer) -> None:
    """Raises UserError when the settings don't fit each other or the processes that were started."""
    strategy, processes = trainer.strategy, trainer.num_devices * trainer.num_nodes
    environment = trainer._accelerator_connector.cluster_environment
    if environment.creates_processes_externally and environment.world_size() != processes:
        raise UserError(
            f"trainer.devices {trainer.num_devices} on trainer.num_nodes {trainer.num_nodes} are {processes} "
            f"processes, but {environment.world_size()} were started: make them equal"
        )
    if optimizer.batch_size % processes:
        raise UserError(f"optimizer.batch_size: {optimizer.batch_size} can't be shared evenly by {processes} processes")
    # What is spawned hands its state back to nobody, and of others nothing is known.
    spawned = isinstance(strategy.launcher, _MultiProcessingLauncher)
    if spawned or not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FSDPStrategy):
        raise UserError(
            f"trainer.strategy: {type(strategy).__name__} of this kind can't be used: set auto, ddp or fsdp"
        )
    if isinstance(strategy, FSDPStrategy):
        if optimizer.name == "muon":
            raise UserError(
                "optimizer.name: muon needs whole matrices, and fsdp splits them: set adamw, or strategy ddp"
            )
        if strategy._state_dict_type != "full":
            raise UserError("trainer.strategy: state_dict_type must be full: checkpoints are files")


def make_loggers(identity: str, resume: Path | None) -> list[Logger]:
    """TensorBoard's and DVCLive's, for a run that starts or goes on from a checkpoint."""
    step = resume.stem.removeprefix("step-") if resume else "0"
    # TensorBoard hides what was logged after the checkpoint before: it happens again.
    first = int(step) + 1 if step.isdigit() else None
    return [
        TensorBoardLogger(LOGS, name="", version=identity[:16], default_hp_metric=False, purge_step=first),
        DVCLiveLogger(dir=str(LIVE), save_dvc_exp=False, report=None, dvcyaml=False),
    ]


class LanguageModel(pl.LightningModule):
    """A GPT-2 and how its loss is computed and its weights are updated."""

    def __init__(self, model, settings):
        super().__init__()
        self.model = model
        self.settings = settings
        self.loss_is_monitored = False
        self.loss = torch.compile(gpt2.loss) if settings.model.compile else gpt2.loss
        # FSDP leaves flat parts of them later.
        self.matrix_names = {name for name, p in self.named_parameters() if p.ndim >= 2}
        self.valid_nll = self.valid_tokens = 0.0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean loss (nats a token) of (B, T + 1) int64 token ids."""
        if self.settings.model.dropout > 0:
            # Dropout draws from the step's own seed, so that a resumed run draws the same.
            step = self.trainer.fit_loop.epoch_loop.total_batch_idx
            torch.manual_seed((self.settings.seed_everything << 32) + step * self.trainer.world_size + self.global_rank)
        loss = self.loss(self.model, batch)
        if self.loss_is_monitored:  # takes a millisecond, and the loggers don't need it
            self.log("loss", loss.detach(), sync_dist=True, logger=False)
        return loss

    def on_validation_epoch_start(self) -> None:
        self.valid_nll = self.valid_tokens = 0.0

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        nll = gpt2.token_losses(self.model, batch)
        if batch_idx < self.trainer.datamodule.valid_batches:
            self.valid_nll += nll.double().sum()
            self.valid_tokens += nll.numel()

    def on_validation_epoch_end(self) -> None:
        sums = torch.stack(
            [torch.as_tensor(x, dtype=torch.float64, device=self.device) for x in (self.valid_nll, self.valid_tokens)]
        )
        nll, tokens = self.trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        loss = nll / tokens
        # Lightning keeps what is logged in float32; the history and the choice of the best need it all.
        self.valid_loss = loss
        self.log("valid_loss", loss, sync_dist=True, logger=False)
        self.log("valid_ppl", math.exp(min(loss, 700.0)), sync_dist=True, logger=False)

    def configure_optimizers(self) -> dict:
        settings = self.settings.optimizer
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        matrices = [p for name, p in trained if name in self.matrix_names]
        vectors = [p for name, p in trained if name not in self.matrix_names]
        # With fp16 the fused step would unscale the gradients itself, after they were clipped.
        adamw = {"lr": settings.lr, "betas": tuple(settings.betas), "fused": self.trainer.precision != "16-mixed"}
        no_decay = {"params": vectors, "weight_decay": 0.0}
        if settings.name == "muon":
            hidden = [p for p in self.model.transformer.h.parameters() if p.ndim == 2]
            others = [p for p in matrices if all(p is not h for h in hidden)]
            optimizer = MuonAndAdamW(
                torch.optim.Muon(
                    hidden, lr=settings.lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
                ),
                torch.optim.AdamW([{"params": others, "weight_decay": settings.weight_decay}, no_decay], **adamw),
            )
        else:
            optimizer = torch.optim.AdamW(
                [{"params": matrices, "weight_decay": settings.weight_decay}, no_decay], **adamw
            )
        # Under mixed precision Lightning clips no gradients of an optimizer that says it unscales them itself.
        optimizer._step_supports_amp_scaling = False
        total = settings.num_training_steps or self.trainer.estimated_stepping_batches
        if settings.num_warmup_steps >= total:
            raise UserError(
                f"optimizer.num_warmup_steps: {settings.num_warmup_steps} of {total} training steps: lower it"
            )
        if math.isinf(total) and settings.schedule != "constant":
            raise UserError(
                f"optimizer.num_training_steps: null, but {settings.schedule} needs to know where training ends"
            )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, total, settings))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        if isinstance(self.trainer.strategy, FSDPStrategy) and gradient_clip_val and gradient_clip_algorithm != "value":
            self.trainer.strategy.model.clip_grad_norm_(gradient_clip_val)  # Lightning itself can't
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)


def lr_factor(step: int, total: float, settings) -> float:
    """Learning rate of an optimizer step, counted from 0, as a fraction of the peak."""
    if step < settings.num_warmup_steps:
        return (step + 1) / settings.num_warmup_steps
    if settings.schedule == "constant":
        return 1.0
    done = min(1.0, (step - settings.num_warmup_steps) / max(1, total - settings.num_warmup_steps))
    shape = 0.5 * (1 + math.cos(math.pi * done)) if settings.schedule == "cosine" else 1 - done
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * shape


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers that Lightning and the schedule see as one."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW):
        self.parts = (muon, adamw)
        super().__init__([p for part in self.parts for group in part.param_groups for p in group["params"]], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict) -> None:
        for part, part_state in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(part_state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


class BlockDataset(Dataset):
    """Blocks of a token stream: inputs and, one further, their targets."""

    def __init__(self, split: Split, block_size: int):
        self.split, self.T = split, block_size

    def __getitems__(self, blocks: list[int]) -> Tensor:
        """(B, T + 1) int64 token ids of B blocks; the stream's last block alone may be shorter."""
        T, tokens = self.T, self.split.tokens
        batch = np.stack([tokens[i * T : i * T + T + 1] for i in blocks]).astype(np.int64)
        if batch.max() >= self.split.vocab_size:
            raise OneProcessError(
                f"data/blocks/{self.split.name}.npy: token id {batch.max()} is outside the vocabulary of "
                f"{self.split.vocab_size:,}: make it again with `dvc repro --force tokenize_blocks`"
            )
        return torch.from_numpy(batch)


class ShuffledBatches(Sampler):
    """Batches of block numbers, shuffled by seed and epoch alone: there is no state to lose.

    Each process takes its share of a batch, so what a step learns from doesn't depend on how
    many there are. An incomplete last batch of an epoch is left out.
    """

    def __init__(self, blocks: int, batch_size: int, seed: int, trainer: pl.Trainer):
        self.blocks, self.batch_size, self.seed, self.trainer = blocks, batch_size, seed, trainer

    def __len__(self) -> int:
        return self.blocks // self.batch_size

    def __iter__(self):
        epoch = self.trainer.current_epoch
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.completed  # not 0 when resumed
        order = np.random.default_rng([self.seed, epoch]).permutation(self.blocks)
        for i in range(done, len(self)):
            batch = order[i * self.batch_size : (i + 1) * self.batch_size]
            yield batch[self.trainer.global_rank :: self.trainer.world_size].tolist()


class Blocks(pl.LightningDataModule):
    """The batches of training and validation."""

    def __init__(self, train: Split, valid: Split, block_size: int, batch_size: int, settings):
        super().__init__()
        self.train, self.valid, self.T, self.batch_size, self.settings = train, valid, block_size, batch_size, settings

    def loader(self, split: Split, batches) -> DataLoader:
        workers = self.settings.runtime.num_workers
        return DataLoader(
            BlockDataset(split, self.T),
            batch_sampler=batches,
            collate_fn=lambda batch: batch,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> DataLoader:
        blocks = (len(self.train.tokens) - 1) // self.T
        seed = self.settings.seed_everything
        return self.loader(self.train, ShuffledBatches(blocks, self.batch_size, seed, self.trainer))

    def val_dataloader(self) -> DataLoader:
        whole = (len(self.valid.tokens) - 1) // self.T
        last = [[whole]] if (len(self.valid.tokens) - 1) % self.T else []
        batches = [list(range(i, min(i + self.batch_size, whole))) for i in range(0, whole, self.batch_size)] + last
        share = batches[self.trainer.global_rank :: self.trainer.world_size]
        self.valid_batches = len(share)
        # Under FSDP all must do as many passes: who has one batch less does another one, uncounted.
        all_equal = math.ceil(len(batches) / self.trainer.world_size)
        return self.loader(self.valid, share + batches[: all_equal - len(share)])


class History(Callback):
    """Loss, learning rate and gradient norm, at points that no logging setting moves; stops at NaN."""

    def __init__(self):
        self.train, self.valid, self.losses = [], [], []

    def on_train_start(self, trainer, module) -> None:
        steps = trainer.estimated_stepping_batches
        self.interval = max(1, math.ceil(steps / HISTORY_POINTS)) if math.isfinite(steps) else 100
        self.T, self.batch_size = module.settings.model.block_size, module.settings.optimizer.batch_size
        self.accumulate = trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        step = trainer.global_step + 1
        if step % self.interval == 0 or step % trainer.log_every_n_steps == 0:
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            self.grad_norm = torch.nn.utils.get_total_norm(gradients)  # before they are clipped
            if isinstance(trainer.strategy, FSDPStrategy):  # each process holds a part of every gradient
                square = self.grad_norm.square().to(module.device)
                self.grad_norm = trainer.strategy.reduce(square, reduce_op="sum").sqrt()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)
        stepped = (
            batch_idx + 1
        ) % trainer.accumulate_grad_batches == 0 or batch_idx + 1 == trainer.num_training_batches
        # Looking at a loss makes the host wait for a GPU or for other processes: there at the points only.
        if module.device.type == "cpu" and trainer.world_size == 1:
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
        each_step = self.losses[-1].device.type == "cpu" and trainer.world_size == 1
        finite = torch.isfinite(torch.stack(self.losses[-1:] if each_step else self.losses))
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
            dvclive = trainer.loggers[1]
            for row in self.history.train:
                metrics = {"loss": row["train_loss"], "lr": row["lr"], "grad_norm": row["grad_norm"]}
                dvclive.log_metrics(metrics, row["step"], sync=False)
            for row in self.history.valid:
                dvclive.log_metrics(valid_metrics(row["valid_loss"]), row["step"], sync=False)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.losses += outputs["loss"].detach() * trainer.accumulate_grad_batches
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
            tensorboard, dvclive = trainer.loggers
            tensorboard.log_metrics(metrics, trainer.global_step)
            # sync=True would make DVCLive read all its files again, and each time there is more in them.
            dvclive.log_metrics(metrics, trainer.global_step, sync=False)
            dvclive.experiment.make_summary()
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


def valid_metrics(loss: float) -> dict[str, float]:
    return {"valid_loss": loss, "valid_ppl": math.exp(min(loss, 700.0))}


def check_monitors(callbacks: list[Callback]) -> None:
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if monitor is not None and monitor not in METRIC_NAMES:
            raise UserError(
                f"trainer.callbacks: {type(callback).__name__} monitors {monitor!r}: "
                f"the metrics are {', '.join(METRIC_NAMES)}"
            )


def run_identity(settings, parser, train: Split, valid: Split) -> str:
    """SHA-256 of all that decides the bytes of the run's result, except how many devices share the work."""
    decides = parser.dump(settings, format="json")
    decides = {
        key: value
        for key, value in json.loads(decides).items()
        if key in ("model", "optimizer", "trainer", "seed_everything")
    }
    for key in ("devices", "num_nodes", "strategy"):
        decides["trainer"].pop(key)
    decides["data"] = [train.sha256, valid.sha256, train.tokenizer]
    decides["versions"] = [library.__version__ for library in (torch, pl, np, transformers)]
    sources = [Path(__file__), *(Path(__file__).with_name(f"{name}.py") for name in ("checkpoints", "gpt2", "ops"))]
    decides["source"] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sources]
    for weights in sorted(Path(settings.model.from_pretrained or os.devnull).glob("*.safetensors")):
        with weights.open("rb") as file:
            decides[weights.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


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


def quiet_libraries() -> None:
    """Advice on choices that this stage has made on purpose would hide what the user must see."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*dataloader is not resumable.*")
    warnings.filterwarnings("ignore", message=".*log_every_n_steps.*")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")


if __name__ == "__main__":
    run(main)
