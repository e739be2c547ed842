"""Batches of blocks, in an order that seed and epoch alone decide."""

import math
from collections.abc import Iterable, Iterator, Sequence

from stages.common.settings import Settings
from stages.text.corpus import mixed
from stages.text.streams import Split
from stages.training.lightning_internals import batches_done

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

AT_A_TIME = 64  # batches whose blocks are drawn together: numpy takes as long for one


def limited(batches: int, limit: float | None) -> int:
    """Those of an epoch's batches that one of Lightning's limits leaves: a number of them, or a share."""
    if limit is None:
        return batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def schedule_of(trainer: pl.Trainer) -> GradientAccumulationScheduler | None:
    """The callback that says how many batches an optimizer step has, where there is one."""
    return next((c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)), None)


def permuted(places: np.ndarray, size: int, key: list[int]) -> np.ndarray:
    """What stands at these places of a random order of 0 .. size - 1, without the order in memory.

    A Feistel network of eight rounds over the even number of bits that `size` needs, walked until the number is
    below `size` (Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains). A round mixes as SplitMix64 does.

    Args:
        places: int64, each in [0, size).
        size: of the order.
        key: whole numbers that decide the order.
    """
    bits = np.uint64(max(1, (max(1, size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(bits)) - 1)
    numbers, outside = places.astype(np.uint64), np.ones(places.shape, bool)
    rounds = np.random.SeedSequence(key).generate_state(8, np.uint64)
    while outside.any():
        left, right = numbers[outside] >> bits, numbers[outside] & mask
        for secret in rounds:
            left, right = right, left ^ mixed(right + secret) & mask
        numbers[outside] = left << bits | right
        outside = numbers >= size
    return numbers.astype(np.int64)


def shuffled(places: np.ndarray, edges: np.ndarray, key: list[int]) -> np.ndarray:
    """The blocks at these places of an epoch: one file of the stream after the other, in a random order, and the
    blocks of each in a random order of its own. So a file is read once an epoch, and only one is needed at a time.

    Args:
        places: int64, each in [0, edges[-1]).
        edges: (files + 1,) the first block that begins in each file, and the number of all.
        key: whole numbers that decide the order.
    """
    sizes = np.diff(edges)
    order = permuted(np.arange(len(sizes)), len(sizes), [*key, len(sizes)])
    ends = np.cumsum(sizes[order])
    turns, blocks = np.searchsorted(ends, places, side="right"), np.empty_like(places)
    for turn in np.unique(turns):
        file, here = order[turn], turns == turn
        within = places[here] - ends[turn] + sizes[file]
        blocks[here] = edges[file] + permuted(within, int(sizes[file]), [*key, file])
    return blocks


def moved(epoch: int, block_size: int) -> int:
    """Where in the stream an epoch's first block begins, from 0 to block_size - 1: elsewhere in each epoch, so that
    no token is always the first of its block. Steps of the golden ratio lie evenly, however many there are.
    """
    return int(epoch * (math.sqrt(5) - 1) / 2 % 1 * block_size)


class BlockDataset(Dataset):
    """Blocks of a token stream: inputs and, one further, their targets."""

    def __init__(self, split: Split, block_size: int):
        self.split, self.T = split, block_size

    def __getitems__(self, starts: Sequence[int]) -> Tensor:
        """(B, T + 1) int64 token ids of B blocks that begin there; the stream's last block alone may be shorter."""
        return torch.from_numpy(self.split.windows(starts, self.T + 1))


class ShuffledBatches(Sampler):
    """Where the blocks of each batch begin, by seed and epoch alone: there is no state to lose, and no order to keep.

    Each process takes its share of a batch, so what a step learns from doesn't depend on how
    many there are. An incomplete last batch of an epoch is left out.
    """

    def __init__(self, split: Split, block_size: int, batch_size: int, seed: int, trainer: pl.Trainer):
        self.edges, self.last = split.tokens.edges, len(split.tokens) - 1 - block_size
        self.T, self.batch_size, self.seed, self.trainer = block_size, batch_size, seed, trainer
        self.blocks = (len(split.tokens) - 1) // block_size

    def __len__(self) -> int:
        return self.blocks // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        epoch, fixed = self.trainer.current_epoch, self.trainer.overfit_batches  # these are the same in every epoch
        first = 0 if fixed else moved(epoch, self.T)
        edges = np.clip(-(-(self.edges - first) // self.T), 0, self.blocks)
        for i in range(batches_done(self.trainer), len(self), AT_A_TIME):
            blocks = np.arange(i * self.batch_size, min(i + AT_A_TIME, len(self)) * self.batch_size)
            if not fixed:
                blocks = shuffled(blocks, edges, [self.seed, epoch])
            starts = np.minimum(first + blocks * self.T, self.last)
            for batch in starts.reshape(-1, self.batch_size).tolist():
                yield batch[self.trainer.global_rank :: self.trainer.world_size]


class LateLoader(DataLoader):
    """A loader whose workers first ask for batches when the first one is wanted.

    Lightning makes the iterator before it restores its loops; workers would fetch the batches of step 0 ahead.
    """

    def __iter__(self) -> Iterator[Tensor]:
        yield from super().__iter__()


class Blocks(pl.LightningDataModule):
    """The batches of training and validation."""

    def __init__(self, train: Split, valid: Split, settings: Settings):
        super().__init__()
        self.train, self.valid, self.settings = train, valid, settings
        self.T, self.batch_size = settings.model.block_size, settings.optimizer.batch_size

    def planned_steps(self, trainer: pl.Trainer) -> float:
        """Optimizer steps of the whole training, infinite where neither steps nor epochs end it.

        Lightning's estimated_stepping_batches says it only once a training has begun, and knows no schedule of
        batches a step.
        """
        batches, schedule = self.epoch_batches(trainer), schedule_of(trainer)
        if trainer.max_epochs in (None, -1):
            steps = math.inf
        elif schedule:
            per_step = map(schedule.get_accumulate_grad_batches, range(trainer.max_epochs))
            steps = sum(math.ceil(batches / each) for each in per_step)
        else:
            steps = math.ceil(batches / trainer.accumulate_grad_batches) * trainer.max_epochs
        return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)

    def epoch_batches(self, trainer: pl.Trainer) -> int:
        """Batches that an epoch has."""
        return limited((len(self.train.tokens) - 1) // self.T // self.batch_size, trainer.limit_train_batches)

    def step_tokens(self, trainer: pl.Trainer) -> int:
        """Tokens that an optimizer step learns from at most."""
        schedule = schedule_of(trainer)
        most = max(schedule.scheduling.values()) if schedule else trainer.accumulate_grad_batches
        return min(most, self.epoch_batches(trainer)) * self.T * self.batch_size

    def planned_epochs(self, trainer: pl.Trainer) -> float:
        """Passes over the training text, infinite where neither steps nor epochs end it."""
        epochs = self.planned_steps(trainer) * self.step_tokens(trainer) / len(self.train.tokens)
        return epochs if trainer.max_epochs in (None, -1) else min(epochs, trainer.max_epochs)

    def loader(self, split: Split, batches: Iterable[Sequence[int]]) -> DataLoader:
        workers = self.settings.runtime.num_workers
        return LateLoader(
            BlockDataset(split, self.T),
            batch_sampler=batches,
            collate_fn=lambda batch: batch,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # or each new iterator would draw from the global one
        )

    def train_dataloader(self) -> DataLoader:
        seed = self.settings.seed_everything
        return self.loader(self.train, ShuffledBatches(self.train, self.T, self.batch_size, seed, self.trainer))

    def val_dataloader(self) -> DataLoader:
        whole = (len(self.valid.tokens) - 1) // self.T
        last = [range(whole, whole + 1)] if (len(self.valid.tokens) - 1) % self.T else []
        batches = [range(i, min(i + self.batch_size, whole)) for i in range(0, whole, self.batch_size)] + last
        batches = [[i * self.T for i in batch] for batch in batches]
        self.all_valid_batches, trainer = len(batches), self.settings.trainer
        limit = trainer.overfit_batches or trainer.limit_val_batches
        batches = batches[: max(1, limited(len(batches), limit))]
        share = batches[self.trainer.global_rank :: self.trainer.world_size]
        self.valid_batches = len(share)
        # Under FSDP all must do as many passes: who has one batch less does another one, uncounted.
        all_equal = math.ceil(len(batches) / self.trainer.world_size)
        return self.loader(self.valid, share + batches[: all_equal - len(share)])
