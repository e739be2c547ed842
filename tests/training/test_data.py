"""What is known of a training's steps before it begins."""

from types import SimpleNamespace

from stages.training.data import Blocks

import pytest
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from test_lightning_internals import Small, trainer_of

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
