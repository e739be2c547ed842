"""What stages/training/lightning_internals.py leans on is still there, and still does what its docstring says."""

import ctypes
import inspect
import os
import platform
import re
import subprocess
import sys

from stages.common.params import NOT_TRAINER_SETTINGS
from stages.common.settings import Runtime, Trainer
from stages.training import lightning_internals as internals

import pytest
import pytorch_lightning as pl
import torch
from conftest import ROOT
from pytorch_lightning.plugins.environments import LightningEnvironment
from torch.utils.data import DataLoader


class Small(internals.QuickAttributes):
    """A line through ten points, five batches an epoch."""

    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.line(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(torch.arange(10.0)[:, None], batch_size=2)

    val_dataloader = train_dataloader


class Watch(pl.Callback):
    def __init__(self, save_at: str | None = None):
        self.seen, self.validated, self.epochs_begun, self.resumed, self.save_at = [], [], [], None, save_at

    def on_train_start(self, trainer, module):
        internals.begin_batch_again(trainer)
        before = len(self.epochs_begun)
        internals.repeat_epoch_start(trainer)
        self.resumed = len(self.epochs_begun) > before

    def on_train_epoch_start(self, trainer, module):
        self.epochs_begun.append(trainer.current_epoch)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        counted = internals.batches_done(trainer), internals.batches_seen(trainer), internals.batches_begun(trainer)
        self.seen.append((batch_idx, *counted))
        if self.save_at and trainer.global_step == 7:
            trainer.save_checkpoint(self.save_at)
            raise KeyboardInterrupt

    def on_validation_start(self, trainer, module):
        self.validated.append(trainer.global_step)


def trainer_of(*callbacks, **arguments) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(**{"accelerator": "cpu", "max_epochs": 2, "num_sanity_val_steps": 0} | quiet | arguments,
                      callbacks=list(callbacks))  # fmt: skip


def test_batches_are_counted_and_counted_anew_after_a_resume(tmp_path):
    whole, stopped, resumed = Watch(), Watch(str(tmp_path / "x.ckpt")), Watch()
    trainer_of(whole, limit_val_batches=0).fit(Small())
    assert whole.seen == [(i % 5, i % 5, i, i) for i in range(10)]
    with pytest.raises(SystemExit):
        trainer_of(stopped, limit_val_batches=0).fit(Small())
    trainer_of(resumed, limit_val_batches=0).fit(Small(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert resumed.seen == whole.seen[7:]
    assert (whole.resumed, resumed.resumed) == (False, True)
    # Once, by us: when Lightning itself calls that hook after a resume, this fails, and repeat_epoch_start() can go.
    assert (whole.epochs_begun, resumed.epochs_begun) == ([0, 1], [1])


def test_metrics_are_put_back():
    """And stay until they are logged again, as a training begins."""

    class AtTheStart(pl.Callback):
        def on_train_start(self, trainer, module):
            internals.put_metrics_back(trainer, {"valid_loss": 2.5})

        def on_train_epoch_end(self, trainer, module):
            assert trainer.callback_metrics["valid_loss"] == 2.5

    trainer_of(AtTheStart(), limit_val_batches=0).fit(Small())


def test_a_validation_inside_a_training():
    class AtTheEnd(pl.Callback):
        def on_train_end(self, trainer, module):
            internals.validate(trainer)
            assert trainer.training and trainer.state.fn == "fit"

    watch = Watch()
    trainer_of(AtTheEnd(), watch, val_check_interval=3).fit(Small())
    assert watch.validated == [3, 8, 10]


def test_who_starts_processes():
    assert isinstance(internals.cluster_environment(trainer_of()), LightningEnvironment)
    assert not internals.is_spawned(trainer_of().strategy)
    assert internals.is_spawned(trainer_of(strategy="ddp_spawn", devices=2).strategy)


def test_gradients_are_clipped_under_mixed_precision():
    class Scaled(Small):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), fused=True)
            internals.clips_itself(optimizer)
            return optimizer

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], fused=True)
    assert optimizer._step_supports_amp_scaling, "clips_itself() isn't needed any more"
    trainer_of(precision="bf16-mixed", gradient_clip_val=0.1, max_steps=2, limit_val_batches=0).fit(Scaled())


def test_a_validation_is_foreseen():
    class Foreseen(pl.Callback):
        def __init__(self):
            self.steps = []

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if internals.validation_follows(trainer, batch_idx, steps=10):
                self.steps.append(trainer.global_step + 1)

    for arguments in ({"val_check_interval": 2}, {"val_check_interval": 3, "check_val_every_n_epoch": None}):
        foreseen, watch = Foreseen(), Watch()
        trainer_of(foreseen, watch, **arguments).fit(Small())
        assert foreseen.steps == sorted({*watch.validated, 10})


def test_no_profiler_is_a_profiler():
    trainer = trainer_of(profiler=internals.NoProfiler(), max_steps=1, limit_val_batches=0)
    trainer.fit(Small())
    with trainer.profiler.profile("anything"):
        pass


def test_glibc_and_onednn():
    """What stages/model/ops.py takes of C and of torch."""
    if sys.platform == "linux" and "glibc" in platform.libc_ver():
        assert ctypes.CDLL(None).mallopt
    if torch.backends.mkldnn.is_available():
        x, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
        got = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        torch.testing.assert_close(got, torch.nn.functional.linear(x, weight, bias))
    assert isinstance(torch.cpu._is_avx512_bf16_supported(), bool) and isinstance(
        torch.cpu._is_amx_tile_supported(), bool
    )


def test_lightning_sets_the_name_of_a_hook_often():
    module, names = Small(), []
    trainer_of(Watch(), max_steps=1, limit_val_batches=0).fit(module)
    assert "_current_fx_name" in vars(module)
    module._current_fx_name = names
    assert module._current_fx_name is names


PROCESSES = """
import torch
from test_lightning_internals import Small, trainer_of
from stages.common.params import NOT_TRAINER_SETTINGS
from stages.common.settings import Runtime, Trainer
from stages.training import lightning_internals as internals
class Watched(Small):
    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 1:
            anew = self.trainer.strategy.model.reducer._rebuild_buckets()
            if self.trainer.is_global_zero:
                print("laid out anew:", anew, flush=True)
for keep in (True, False):
    trainer = trainer_of(strategy="ddp", devices=2, max_steps=2, limit_val_batches=0)
    if keep:
        internals.keep_buckets(trainer.strategy)
    trainer.fit(Watched())
    torch.distributed.destroy_process_group()
"""


def test_buckets_are_kept(tmp_path):
    (tmp_path / "two.py").write_text(PROCESSES)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/training'}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "two.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # What DDP does unless it is told not to: when it doesn't any more, this fails, and keep_buckets() can go.
    assert re.findall("anew: (True|False)", done.stdout) == ["False", "True"]


def test_the_trainer_group_is_the_trainers_signature():
    """Names and defaults of what params.yaml leaves out."""
    taken = set(NOT_TRAINER_SETTINGS) | Runtime.model_fields.keys() | {"self"}
    signature = {name: p.default for name, p in inspect.signature(pl.Trainer.__init__).parameters.items()}
    left_out = {name: default for name, default in signature.items() if name not in taken}
    assert Trainer.model_construct().model_dump() == left_out
