"""Makes models/gpt2/: a GPT-2 trained with PyTorch Lightning, at its best validation loss.

Interrupted, it goes on from its last checkpoint in models/checkpoints/ at the next run with the
same settings and data.
"""

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from stages.common.devices import AUTOCAST
from stages.common.errors import UserError, one_line, run
from stages.common.files import check_states, new_folder, states_in
from stages.common.params import load
from stages.common.paths import METRICS, MODEL, TOKENIZER
from stages.common.processes import join, lost_another
from stages.common.settings import Settings
from stages.model import gpt2, ops
from stages.text.streams import Split, load_split
from stages.text.tokenizers import copy_tokenizer, load_tokenizer
from stages.training.best import BestWeights
from stages.training.checkpoints import Checkpoints, Interrupted, remove_older_finished, training_lock
from stages.training.data import Blocks, limited
from stages.training.history import History
from stages.training.identity import run_identity
from stages.training.model_card import model_card
from stages.training.module import LanguageModel
from stages.training.sharded import module_of
from stages.training.trainer import check_processes, make_trainer, on_this_machine, quiet_libraries
from stages.watch.progress import Live, make_loggers
from stages.watch.summary import print_start, print_summary, write_run_figures

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
from transformers import GPT2LMHeadModel


def main() -> None:
    settings = on_this_machine(load("stages.train", __doc__))
    quiet_libraries()
    ops.reuse_memory()
    train, valid = load_split("train"), load_split("valid")
    key, pretrained = "model.from_pretrained", settings.model.from_pretrained
    before = states_in(pretrained)
    model = first_model(settings, train)
    identity, trunk = run_identity(settings, train, valid)
    best, history = BestWeights(), History()
    checkpoints = Checkpoints(identity, train.tokenizer, settings.runtime, best)
    module, blocks = module_of(model, settings), Blocks(train, valid, settings)
    trainer = make_trainer(settings, best, [history, Live(history), checkpoints])
    check_processes(trainer, settings)
    trainer.precision_plugin.convert_module(module)  # or a checkpoint's weights would pass through float32
    vars(model.config).pop("precision", None)  # of the model that is trained further
    if trainer.precision in AUTOCAST:
        model.config.precision = trainer.precision  # so that the evaluation computes alike
    checkpoints.share_trunk(trunk, settings.optimizer, blocks.planned_steps(trainer))

    with stopped_in_one_line(trainer):
        fit(trainer, module, blocks, checkpoints, history)

    if trainer.is_global_zero:
        with new_folder(MODEL) as folder:
            model.generation_config = gpt2.sampling(model, settings.model.block_size)
            best.export(model, folder)
            copy_tokenizer(TOKENIZER, folder, settings.model.block_size)
            tokens = blocks.step_tokens(trainer)
            model_card(settings, model.num_parameters(), train, valid, checkpoints, tokens).save(folder / "README.md")
            best.check(trainer, folder)
            check_states(key, pretrained, before)
        history.write(METRICS)
        remove_older_finished(checkpoints.folder)
        figures = write_run_figures(trainer, model.num_parameters(), checkpoints, history)
        print_summary(checkpoints, valid, figures, trainer.loggers[0].log_dir)
    trainer.strategy.barrier("exported")


def first_model(settings: Settings, train: Split) -> GPT2LMHeadModel:
    """The model before its first step.

    Raises:
        UserError: blocks, tokenizer, settings and a pretrained model don't fit each other.
    """
    tokenizer = load_tokenizer(TOKENIZER)
    check_data(settings, train, tokenizer.fingerprint)
    pl.seed_everything(settings.seed_everything, workers=True, verbose=False)
    if settings.model.from_pretrained is None:
        return gpt2.new_model(settings.model, train.vocab_size, tokenizer.end_of_text)
    return gpt2.pretrained_model(settings.model, tokenizer)


def check_data(settings: Settings, train: Split, fingerprint: str) -> None:
    """Raises UserError when the blocks don't fit the tokenizer or the settings."""
    if train.tokenizer != fingerprint:  # of all splits: they have it from one file
        raise UserError("data/blocks was made by another tokenizer than models/tokenizer: run `dvc repro`")
    T, batch_size = settings.model.block_size, settings.optimizer.batch_size
    predicted = len(train.tokens) - 1
    if predicted < T:
        raise UserError(f"model.block_size: {T} is more than the {predicted:,} tokens to predict in train")
    if predicted // T < batch_size:
        raise UserError(
            f"optimizer.batch_size: train has only {predicted // T:,} blocks of "
            f"model.block_size {T}, less than one batch of {batch_size}: lower one of them"
        )
    trainer, interval = settings.trainer, settings.trainer.val_check_interval
    batches = limited(predicted // T // batch_size, trainer.overfit_batches or trainer.limit_train_batches)
    if not isinstance(interval, int | float | None):
        raise UserError(
            f"trainer.val_check_interval: {interval}: the clock would decide what is validated, and so the result: "
            "write a fraction of an epoch, or a whole number of batches"
        )
    validated = trainer.limit_val_batches != 0 and trainer.check_val_every_n_epoch is not None
    if isinstance(interval, int) and interval > batches and validated:
        raise UserError(
            f"trainer.val_check_interval: {interval} is more than the {batches:,} batches of an epoch: "
            "lower it, or set trainer.check_val_every_n_epoch: null"
        )


def fit(trainer: pl.Trainer, module: LanguageModel, blocks: Blocks, checkpoints: Checkpoints, history: History) -> None:
    """Trains to the end, from the run's newest checkpoint where there is one."""
    join(trainer.strategy.root_device)
    checkpoints.lock = training_lock() if trainer.is_global_zero else None
    resume = checkpoints.newest(trainer)
    trainer.loggers = [*make_loggers(module, checkpoints.identity, resume), *trainer.loggers]  # and the users'
    if trainer.is_global_zero:
        print_start(trainer, module, blocks, resume)
    if resume == checkpoints.final:
        if trainer.is_global_zero:
            checkpoints.load_final(history)
    else:
        trainer.fit(module, datamodule=blocks, ckpt_path=resume, weights_only=True)
        if not checkpoints.ended:
            checkpoints.end_where_it_is(trainer)


@contextmanager
def stopped_in_one_line(trainer: pl.Trainer) -> Iterator[None]:
    """What ends a training early is one line, and the exit status that tells a shell which signal it was.

    Raises:
        UserError: Lightning refuses the settings, or one of several processes has ended.
        SystemExit: a signal asked it to stop, and its checkpoint is saved.
    """
    try:
        yield
    except MisconfigurationException as error:
        raise UserError(f"trainer: {one_line(error, 1000)}") from None
    except RuntimeError as error:
        if str(error).startswith("Early stopping conditioned on metric"):
            raise UserError(f"trainer.callbacks: EarlyStopping: {one_line(error, 1000)}") from None
        if not lost_another(error):  # one that waits in NCCL is ended by its launcher
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


if __name__ == "__main__":
    run(main)
