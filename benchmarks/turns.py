"""Turns: the contenders of a benchmark are processes that compute one at a time.

Times on one machine drift by tens of percent over minutes, so contenders are measured in turns,
A B A B, a few seconds each, while the others wait for a line on a pipe. Each stays warm, and
start-up and compiling lie before its first measured turn.
"""

import json
import os
import pty
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from stages.watch.progress import Live

import psutil
import pytorch_lightning as pl
import torch

ROOT = Path(__file__).resolve().parent.parent
DISTURBED = 0.05  # other processes' share of the machine above which a turn is repeated
TRIES = 3


class Turns:
    """A contender's side. It calls `next_step` before each of its steps."""

    def __init__(self):
        read, write = (int(number) for number in os.environ["BENCHMARK_TURNS"].split(","))
        self.read, self.write = os.fdopen(read), os.fdopen(write, "w")
        self.steps, self.end = None, None

    def next_step(self) -> None:
        """Returns at once while the turn lasts; else reports it, and waits for the next."""
        if self.steps is not None:
            if self.steps < self.least_steps or time.perf_counter() < self.end:
                self.steps += 1
                return
            synchronize()
            report = {"steps": self.steps, "seconds": time.perf_counter() - self.start, "started": self.start}
            print(json.dumps(report), file=self.write, flush=True)
        line = self.read.readline()
        if not line:
            os._exit(0)
        seconds, self.least_steps = json.loads(line)
        self.steps, self.start = 1, time.perf_counter()
        self.end = self.start + seconds

    def pause(self) -> None:
        """Stops the clock, for work that only this contender was asked to do."""
        synchronize()
        self.paused = time.perf_counter()

    def resume(self) -> None:
        elapsed = time.perf_counter() - self.paused
        self.start += elapsed
        self.end += elapsed


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class TakesTurns(pl.Callback):
    """Makes the train stage a contender: a callback that a user's params.yaml could name too."""

    def __init__(self):
        self.turns = Turns()

    def on_train_start(self, trainer, module) -> None:
        """Hangs itself on the stage's Live: another callback would cost the stage 2 % of a step of the byte shape."""
        live = next(callback for callback in trainer.callbacks if isinstance(callback, Live))
        live.on_train_batch_start = self.on_train_batch_start
        start, end = live.on_validation_start, live.on_validation_end
        live.on_validation_start = lambda *both: (self.on_validation_start(*both), start(*both))
        live.on_validation_end = lambda *both: (end(*both), self.on_validation_end(*both))
        trainer.callbacks = [callback for callback in trainer.callbacks if callback is not self]

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.turns.next_step()

    def on_validation_start(self, trainer, module) -> None:
        self.turns.pause()

    def on_validation_end(self, trainer, module) -> None:
        self.turns.resume()


class Failed(Exception):
    """A contender has ended; the text is one line that says why."""


class Contender:
    """The parent's side: a process with a terminal of its own, as a user's would have."""

    def __init__(self, name: str, *arguments: str, cwd: Path, environment: Mapping[str, str] = {}):
        self.name = name
        its_read, to_it = os.pipe()
        from_it, its_write = os.pipe()
        terminal, its_terminal = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=cwd,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "BENCHMARK_TURNS": f"{its_read},{its_write}",
                "HF_HUB_OFFLINE": "1",
                **environment,
            },
            pass_fds=(its_read, its_write),
            stdin=subprocess.DEVNULL,
            stdout=its_terminal,
            stderr=its_terminal,
        )
        for number in (its_read, its_write, its_terminal):
            os.close(number)
        self.to_it, self.from_it = os.fdopen(to_it, "w"), os.fdopen(from_it)
        self.output = deque(maxlen=50)
        self.drained = threading.Thread(target=self.drain, args=(terminal,), daemon=True)
        self.drained.start()

    def drain(self, terminal: int) -> None:
        with open(terminal, "rb", buffering=0) as stream:
            try:
                while part := stream.read(1 << 16):
                    self.output.append(part)
            except OSError:
                pass  # the process has ended

    def turn(self, seconds: float, least_steps: int = 1) -> dict[str, float]:
        """How many steps one turn had, its seconds, and when (perf_counter) it started."""
        try:
            print(json.dumps([seconds, least_steps]), file=self.to_it, flush=True)
            line = self.from_it.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.process.wait()
            self.drained.join()
            said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(self.output).decode(errors="replace")).split("\n")
            why = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
            raise Failed(f"{self.name} failed with status {self.process.returncode}: {why[:300]}")
        return json.loads(line)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        with suppress(BrokenPipeError):
            self.to_it.close()
        self.from_it.close()


def measured_turn(contender: Contender, seconds: float) -> tuple[float, float]:
    """A turn: the share of the machine's CPU time that other processes used in it, and steps per second."""
    process = psutil.Process(contender.process.pid)

    def used() -> tuple[float, float]:
        machine = psutil.cpu_times()
        own = sum(sum(one.cpu_times()[:4]) for one in (process, *process.children(recursive=True)))
        return sum(machine) - machine.idle - machine.iowait - machine.guest, own

    before, started = used(), time.perf_counter()
    turn = contender.turn(seconds)
    after, elapsed = used(), time.perf_counter() - started
    others = (after[0] - before[0]) - (after[1] - before[1])
    return max(0.0, others) / (elapsed * psutil.cpu_count()), turn["steps"] / turn["seconds"]


def interleave(
    contenders: list[Contender], rounds: int, seconds: float, warm_up_steps: int = 1
) -> tuple[dict[str, list[float]], str]:
    """Steps per second of every contender in every round, after a turn each to warm up.

    A turn in which other processes of the machine computed too is done again, up to TRIES times;
    then the least disturbed one counts. The second value says how much they computed, and which
    contenders failed before their first turn and are left out.

    Raises:
        SystemExit: the first contender failed, or another one in its turn.
    """
    started_ones, failures = contenders, []
    try:
        contenders = []
        for contender in started_ones:
            started = time.monotonic()
            try:
                contender.turn(0.5, warm_up_steps)
            except Failed as failure:
                print(f"  {failure}", flush=True)
                failures.append(str(failure))
                continue
            contenders.append(contender)
            print(f"  {contender.name}: warm after {time.monotonic() - started:.0f} s", flush=True)
        if contenders[:1] != started_ones[:1]:
            sys.exit(f"error: {failures[0]}")
        rates = {contender.name: [] for contender in contenders}
        disturbances, repeated = [], 0
        for _ in range(rounds):
            for contender in contenders:
                tries = [measured_turn(contender, seconds)]
                while tries[-1][0] > DISTURBED and len(tries) < TRIES:
                    tries.append(measured_turn(contender, seconds))
                disturbance, rate = min(tries)
                rates[contender.name].append(rate)
                disturbances.append(disturbance)
                repeated += len(tries) - 1
        share = f"{100 * statistics.mean(disturbances):.0f}% on average, {100 * max(disturbances):.0f}% at most"
        note = f"Other processes' share of the CPU during a turn: {share}; {repeated} turns were repeated."
        return rates, "\n\n".join([note, *(f"Left out: {failure}" for failure in failures)])
    except Failed as failure:
        sys.exit(f"error: {failure}")
    finally:
        for contender in started_ones:
            contender.end()
