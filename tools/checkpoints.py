"""Lists the checkpoints that a training can go on from in models/checkpoints/; --clean deletes them.

The train stage keeps a folder a run here. Its name starts the run's identity, a hash of all the
settings, data and code that decide the run's result, so that only the same run goes on from it.
With schedule wsd, longer trainings go on from the start of a cooldown, in a folder of its own.
"""

import shutil

from stages.common.commands import CommandLine
from stages.common.errors import run
from stages.common.paths import CHECKPOINTS
from stages.training.checkpoints import step_of, training_lock


def main() -> None:
    command = CommandLine("tools.checkpoints", __doc__)
    command.add_argument("--clean", action="store_true", help="delete them")
    clean = command.parse_args().clean
    lock = training_lock(wait=False) if clean else None
    for folder in sorted(CHECKPOINTS.glob("*/")):
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        newest = max(folder.glob("*-*.ckpt"), key=step_of, default=None)
        kind = "start of a cooldown, step" if newest and newest.name.startswith("trunk") else "step"
        step = f"{kind} {step_of(newest):,}" if newest else "no checkpoint"
        step = "finished" if (folder / "final.ckpt").exists() else step
        print(f"{folder}: {step}, {size / 2**20:,.1f} MiB{', deleted' if clean else ''}")
        if clean:
            shutil.rmtree(folder)
    if lock:
        lock.close()


if __name__ == "__main__":
    run(main)
