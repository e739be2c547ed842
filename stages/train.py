"""Makes models/gpt2/: a GPT-2 trained with PyTorch Lightning, at its best validation loss.

Interrupted, it goes on from its last checkpoint in models/checkpoints/ at the next run with the
same settings and data.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
import transformers
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.profilers import PassThroughProfiler
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from stages import gpt2, ops
from stages.atomic import new_folder
from stages.blocks import Split, load_split, load_tokenizer
from stages.checkpoints import AtomicCheckpointIO, Checkpoints, Interrupted, training_lock
from stages.history import (
    LIVE,
    METRICS,
    MODEL,
    History,
    Live,
    make_loggers,
    print_summary,
    valid_metrics,
    write_run_figures,
)
from stages.model_card import model_card
from stages.settings import OneProcessError, UserError, first_reason, load, make_parser, run

TOKENIZER = Path("models/tokenizer")
METRIC_NAMES = ("loss", "valid_loss", "valid_ppl")


def main() -> None:
    parser = make_parser("train", __doc__)
    settings = load(parser)
    quiet_libraries()
    ops.reuse_memory()
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
            profiler=settings.runtime.profiler or NoProfiler(),
            num_sanity_val_steps=settings.runtime.num_sanity_val_steps,
            enable_progress_bar=False,  # Live has one
            enable_model_summary=False,
            enable_checkpointing=any(isinstance(callback, pl.callbacks.ModelCheckpoint) for callback in users),
            use_distributed_sampler=False,  # ShuffledBatches shares the work out itself
        )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        # Lightning and the users' callbacks check their arguments in their own ways.
        raise UserError(f"trainer: {first_reason(str(error))}: change the trainer group") from None


class NoProfiler(PassThroughProfiler):
    """Lightning enters 80 of these contexts a step; its own are generators, a tenth of a millisecond in all."""

    nothing = nullcontext()

    def profile(self, action_name: str) -> nullcontext:
        return self.nothing


def check_processes(trainer: pl.Trainer, optimizer) -> None:
    """Raises UserError when the settings don't fit each other or the processes that were started."""
    strategy, processes = trainer.strategy, trainer.num_devices * trainer.num_nodes
    environment = trainer._accelerator_connector.cluster_environment
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

    def __setattr__(self, name: str, value) -> None:
        if name == "_current_fx_name":  # Lightning does so 40 times a step, and a Module first looks for parameters
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

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
        self.log_dict(valid_metrics(loss), sync_dist=True, logger=False)

    def configure_optimizers(self) -> dict:
        settings = self.settings.optimizer
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        matrices = [p for name, p in trained if name in self.matrix_names]
        vectors = [p for name, p in trained if name not in self.matrix_names]
        precision = self.settings.trainer.precision
        # With fp16 the fused step would unscale the gradients itself, after they were clipped.
        adamw = {"lr": settings.lr, "betas": tuple(settings.betas), "fused": str(precision) not in ("16", "16-mixed")}
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
        by_norm = gradient_clip_val and gradient_clip_algorithm != "value"
        if by_norm and isinstance(self.trainer.strategy, FSDPStrategy):
            self.trainer.strategy.model.clip_grad_norm_(gradient_clip_val)  # Lightning itself can't
        elif by_norm and self.device.type == "cpu":
            # Most often there is nothing to clip, and a CPU needn't then multiply all gradients by 1.
            trained = [p for p in self.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
            if not norm <= gradient_clip_val:
                torch.nn.utils.clip_grads_with_norm_(trained, gradient_clip_val, norm)
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
    sources = [
        Path(__file__),
        *(Path(__file__).with_name(f"{name}.py") for name in ("checkpoints", "gpt2", "history", "ops")),
    ]
    decides["source"] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sources]
    for weights in sorted(Path(settings.model.from_pretrained or os.devnull).glob("*.safetensors")):
        with weights.open("rb") as file:
            decides[weights.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def quiet_libraries() -> None:
    """Advice on choices that this stage has made on purpose would hide what the user must see."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*dataloader is not resumable.*")
    warnings.filterwarnings("ignore", message=".*log_every_n_steps.*")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")


if __name__ == "__main__":
    run(main)
