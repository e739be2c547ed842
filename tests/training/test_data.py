"""The order of the blocks, and what is known of a training's steps before it begins."""

from types import SimpleNamespace

from stages.training.data import Blocks, ShuffledBatches, moved, permuted, shuffled

import numpy as np
import pytest
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from scipy.stats import chisquare
from test_lightning_internals import Small, trainer_of


class TokenEdges:
    """Of a stream's files, only where each begins."""

    def __init__(self, edges: list[int]):
        self.edges = np.array(edges)

    def __len__(self) -> int:
        return int(self.edges[-1])


SETTINGS = SimpleNamespace(model=SimpleNamespace(block_size=1), optimizer=SimpleNamespace(batch_size=2))


@pytest.mark.parametrize(
    ("arguments", "callbacks", "steps"),
    [
        ({}, [], 10),
        ({"accumulate_grad_batches": 3}, [], 4),
        ({}, [GradientAccumulationScheduler({0: 1, 1: 3})], 7),
        ({"max_steps": 6}, [GradientAccumulationScheduler({0: 1, 1: 3})], 6),
        ({"limit_train_batches": 0.5}, [], 4),
        ({"limit_train_batches": 4}, [], 8),
        ({"overfit_batches": 3}, [], 6),
        ({"max_epochs": None, "max_steps": 7}, [], 7),
        ({"max_epochs": -1, "max_steps": 7}, [], 7),
    ],
)
def test_planned_steps_are_those_that_are_done(arguments, callbacks, steps):
    """As Lightning does them, on the five batches an epoch of `Small`."""
    blocks = Blocks(SimpleNamespace(tokens=range(11)), SimpleNamespace(), SETTINGS)
    trainer = trainer_of(*callbacks, **{"limit_val_batches": 0} | arguments)
    assert blocks.planned_steps(trainer) == steps
    trainer.fit(Small())
    assert trainer.global_step == steps
    assert blocks.planned_steps(trainer) == steps


def test_a_training_by_the_clock_has_no_known_end():
    blocks = Blocks(SimpleNamespace(tokens=range(11)), SimpleNamespace(), SETTINGS)
    assert blocks.planned_steps(trainer_of(max_epochs=-1, max_time="00:00:01:00")) == float("inf")


@pytest.mark.parametrize("size", [*range(1, 40), 4096, 4097, 65_537])
def test_an_order_holds_every_block_once(size):
    assert sorted(permuted(np.arange(size), size, [1, 0])) == list(range(size))


def test_each_place_of_an_order_is_known_by_itself():
    """So it takes no memory: 250 million blocks' whole order would be 2 GB."""
    order = permuted(np.arange(1000), 1000, [1, 0])
    assert [permuted(np.array([i]), 1000, [1, 0])[0] for i in range(1000)] == order.tolist()
    far = permuted(np.array([0, 249_999_999]), 250_000_000, [1, 0])
    assert far.tolist() == permuted(np.array([0, 249_999_999]), 250_000_000, [1, 0]).tolist() != [0, 249_999_999]


def test_an_order_is_another_one_with_each_seed_and_epoch():
    orders = {tuple(permuted(np.arange(50), 50, [seed, epoch])) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


@pytest.mark.parametrize("size", [2, 5, 16, 37])
def test_every_block_stands_at_every_place_equally_often(size):
    counts = np.zeros((size, size))
    for epoch in range(4000):
        counts[np.arange(size), permuted(np.arange(size), size, [1, epoch])] += 1
    assert min(chisquare(place).pvalue for place in counts) > 1e-4


def test_an_epoch_goes_through_one_file_of_a_long_stream_after_the_other():
    edges = np.array([0, 40, 70, 75])
    orders = [shuffled(np.arange(75), edges, [1, epoch]) for epoch in range(50)]
    for order in orders:
        assert sorted(order) == list(range(75))
        files = np.searchsorted(edges, order, side="right") - 1
        assert (np.diff(files) != 0).sum() == 2
    assert [shuffled(np.array([i]), edges, [1, 0])[0] for i in range(75)] == orders[0].tolist()
    assert len({tuple(order) for order in orders}) == 50
    assert {np.searchsorted(edges, order[0], side="right") for order in orders} == {1, 2, 3}


@pytest.mark.parametrize("size", [1, 16, 128])
def test_blocks_begin_elsewhere_in_each_epoch(size):
    firsts = [moved(epoch, size) for epoch in range(300)]
    assert firsts[0] == 0 and set(firsts) == set(range(size))
    gaps = np.diff(sorted([*firsts[:8], size]))
    assert gaps.max() <= max(1, size * 0.24)  # eight drawn at random leave a gap of a third


def test_each_block_is_read_with_the_file_in_which_it_begins():
    split = SimpleNamespace(tokens=TokenEdges([0, 50, 101, 103]))
    trainer = trainer_of()
    for epoch, first in enumerate([0, 2, 0, 3]):
        trainer.fit_loop.epoch_progress.current.completed = epoch
        starts = [start for batch in ShuffledBatches(split, 4, 1, 1, trainer) for start in batch]
        assert sorted(starts) == [min(98, start) for start in range(first, 100 + first, 4)]
        files = np.searchsorted(split.tokens.edges, starts, side="right") - 1
        assert (np.diff(files) != 0).sum() == len(set(files)) - 1, starts


def test_the_blocks_of_one_file_stand_in_the_order_of_their_seed_and_epoch():
    places = np.array([3, 0, 74])
    assert shuffled(places, np.array([0, 75]), [1, 2]).tolist() == permuted(places, 75, [1, 2]).tolist()


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(("limit", "tokens"), [(None, 23), (3, 6), (0.5, 12), (0.01, 2)])
def test_processes_share_the_limited_validation(world, limit, tokens):
    """However many there are, the same text is validated."""
    trainer = SimpleNamespace(limit_val_batches=limit, overfit_batches=0.0)
    settings = SimpleNamespace(**vars(SETTINGS), trainer=trainer, runtime=SimpleNamespace(num_workers=0))
    scored = 0
    for rank in range(world):
        blocks = Blocks(SimpleNamespace(), Split(range(24)), settings)
        blocks.trainer = SimpleNamespace(global_rank=rank, world_size=world)
        batches = list(blocks.val_dataloader())[: blocks.valid_batches]
        scored += sum(batch.shape[0] for batch in batches)
    assert scored == tokens


class Split:
    def __init__(self, tokens: range):
        self.tokens = tokens

    def windows(self, starts: list[int], length: int) -> np.ndarray:
        return np.array([self.tokens[start : start + length] for start in starts])


def test_tokens_and_epochs_of_a_schedule_of_batches():
    blocks = Blocks(SimpleNamespace(tokens=range(11)), SimpleNamespace(), SETTINGS)  # 5 batches of 2 tokens
    for arguments, callbacks, tokens, epochs in (
        ({}, [], 2, 20 / 11),
        ({"accumulate_grad_batches": 1000}, [], 10, 20 / 11),
        ({}, [GradientAccumulationScheduler({0: 1, 1: 3})], 6, 2),
        ({"max_epochs": None, "max_steps": 11}, [], 2, 2),
    ):
        trainer = trainer_of(*callbacks, **arguments)
        assert blocks.step_tokens(trainer) == tokens
        assert blocks.planned_epochs(trainer) == pytest.approx(epochs)
