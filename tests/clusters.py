"""Two hosts on one machine, in network namespaces: what docs/scale.md says of torchrun and SLURM, done.

Needs Linux, root, and Debian's iproute2, slurm-wlm and munge: `python tests/clusters.py`. It prints what the hosts
print, and ends with status 1 where something is not as the page says.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from conftest import ROOT, digests, run, set_params, small_project

sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests/training"))
from test_scale import same_training

HOSTS = {"node1": "10.9.0.1", "node2": "10.9.0.2"}
FIGURES = ("eval.json", "details.json", "documents.csv", "loss_by_position.csv", "samples.md")
STATES = ("sinfo", "--noheader", "--format=%T %D")
SLURM = """
ClusterName=two
SlurmctldHost=node1
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=node[1-2] CPUs=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE
"""


@contextlib.contextmanager
def two_hosts() -> Iterator[None]:
    """node1 and node2: each with a network, a name and a hosts file of its own, and one file system for both."""
    names = "127.0.0.1 localhost\n" + "".join(f"{address} {host}\n" for host, address in HOSTS.items())
    try:
        for host in HOSTS:
            Path("/etc/netns", host).mkdir(parents=True)
            Path("/etc/netns", host, "hosts").write_text(names)
            run("ip", "netns", "add", host, cwd=ROOT)
        run("ip", "link", "add", "wire1", "type", "veth", "peer", "name", "wire2", cwd=ROOT)
        for (host, address), wire in zip(HOSTS.items(), ("wire1", "wire2")):
            run("ip", "link", "set", wire, "netns", host, cwd=ROOT)
            run("ip", "-n", host, "addr", "add", f"{address}/24", "dev", wire, cwd=ROOT)
            run("ip", "-n", host, "link", "set", wire, "up", cwd=ROOT)
            run("ip", "-n", host, "link", "set", "lo", "up", cwd=ROOT)
        yield
    finally:
        for host in HOSTS:
            run("ip", "netns", "del", host, cwd=ROOT, check=False)
            shutil.rmtree(Path("/etc/netns", host))


def on(host: str, *command: str, cwd: Path, **environment: str) -> subprocess.Popen:
    """Starts a command on a host; its output, standard error too, is in a file."""
    script = f'hostname {host}; exec "$@"'
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment}
    output = tempfile.NamedTemporaryFile("w+", suffix=f".{host}")
    command = ("ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", script, "sh", *command)
    process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=output, stderr=subprocess.STDOUT)
    process.output = output
    return process


def printed(process: subprocess.Popen, status: int = 0) -> str:
    """What a command on a host has printed, at its end."""
    got = process.wait(timeout=300)
    text = Path(process.output.name).read_text()
    assert got == status, f"status {got}: {text}"
    return text


def wait_for(what: Callable[[], object], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.1)


def show(title: str, text: str) -> None:
    print(f"\n==== {title}\n{text.strip()}", flush=True)


def torchrun(project: Path, stage: str, *options: str) -> list[subprocess.Popen]:
    """The command of docs/scale.md on both hosts."""
    words = ["torchrun", "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "node1", "--master-port", "29500"]
    return [on(host, *words, "--node-rank", str(i), *options, "-m", stage, cwd=project) for i, host in enumerate(HOSTS)]


def ranks(project: Path) -> dict[str, int]:
    """Process ids of the trainings in a folder by their rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"stages.train" in (process / "cmdline").read_bytes() and (process / "cwd").resolve() == project:
                environment = dict(line.split("=", 1) for line in (process / "environ").read_text().split("\0") if line)
                if "RANK" in environment:
                    found[environment["RANK"]] = int(process.name)
    return found


def torchrun_goes_on(project: Path, alone: Path) -> None:
    """A process of node2 is killed; with --max-restarts all go on from the checkpoint, and evaluate together."""
    agents = torchrun(project, "stages.train", "--max-restarts", "1")
    wait_for(lambda: list(project.glob("models/checkpoints/*/step-*.ckpt")) or agents[0].poll() is not None)
    os.kill(ranks(project)["1"], 9)
    outputs = [printed(agent) for agent in agents]
    for host, output in zip(HOSTS, outputs):
        show(f"{host}: torchrun ... --max-restarts 1 -m stages.train, rank 1 killed", output)
    assert "going on from" in outputs[0]
    same_training(project, alone)
    run("dvc", "commit", "--force", "train", cwd=project)

    outputs = [printed(agent) for agent in torchrun(project, "stages.evaluate")]
    show("node1: torchrun ... -m stages.evaluate", outputs[0])
    assert not outputs[1], outputs[1]
    together = digests(project, *(f"metrics/{name}" for name in FIGURES))
    run("python", "-m", "stages.evaluate", cwd=project)
    assert together == digests(project, *(f"metrics/{name}" for name in FIGURES))


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """A controller on node1 and a daemon on each host; yields what a command needs to find them."""
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(SLURM.format(folder=folder))
    # No cgroup is asked for, but the daemon loads one of its plugins.
    (folder / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={folder}/cgroup\n")
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    found = {"SLURM_CONF": str(folder / "slurm.conf")}
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    socket = f"--socket={folder}/munge.socket"
    daemons = [on("node1", "munged", "--foreground", "--force", f"--key-file={folder}/key", socket, *files, cwd=folder)]
    wait_for((folder / "munge.socket").exists)
    daemons.append(on("node1", "slurmctld", "-D", cwd=folder, **found))
    for host in HOSTS:
        (folder / host).mkdir()
        daemons.append(on(host, "slurmd", "-D", cwd=folder, **found))
    try:
        wait_for(lambda: "idle 2" in printed(on("node1", *STATES, cwd=folder, **found)), 60)
        yield found
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()


def slurm_goes_on(project: Path, alone: Path, found: dict[str, str]) -> None:
    """The script of docs/scale.md: stopped as its time is up, queued again, and done."""
    script = re.search(r"```text\n(#!/bin/bash\n#SBATCH.*?)```", (ROOT / "docs/scale.md").read_text(), re.S).group(1)
    (project / "train.sbatch").write_text(script)

    def command(*words: str) -> str:
        return printed(on("node1", *words, cwd=project, **found))

    job = command("sbatch", "--ntasks-per-node=1", "--gpus-per-node=0", "train.sbatch").split()[-1]
    wait_for(lambda: list(project.glob("models/checkpoints/*/step-*.ckpt")))
    command("scancel", "--signal=TERM", job)  # what --signal does before the time is up
    wait_for(lambda: "Restarts=1" in command("scontrol", "show", "job", job))
    show("scontrol show job, after the signal", command("scontrol", "show", "job", job))
    wait_for(lambda: "idle 2" in command(*STATES))  # the script of the first start has ended too
    command("scontrol", "update", f"JobId={job}", "StartTime=now")  # SLURM lets two minutes pass
    wait_for(lambda: "JobState=COMPLETED" in command("scontrol", "show", "job", job))
    output = (project / f"slurm-{job}.out").read_text()
    show("sbatch train.sbatch, stopped and queued again", output)
    assert output.count("stopped by SIGTERM") == output.count("going on from") == 1
    same_training(project, alone)
    assert "up to date" in run("dvc", "status", cwd=project).stdout
    together = digests(project, *(f"metrics/{name}" for name in FIGURES))
    run("python", "-m", "stages.evaluate", cwd=project)
    assert together == digests(project, *(f"metrics/{name}" for name in FIGURES))


def main() -> None:
    with tempfile.TemporaryDirectory() as name, two_hosts():
        alone = small_project(Path(name) / "alone", "trainer.accelerator=cpu")
        run("dvc", "repro", cwd=alone)
        for kind in ("torchrun", "slurm"):
            project = Path(name) / kind
            shutil.copytree(alone, project)
            shutil.rmtree(project / "models/checkpoints")
            set_params(project, "trainer.num_nodes=2", "runtime.checkpoint_every_n_steps=20", "trainer.strategy=ddp")
        torchrun_goes_on(Path(name) / "torchrun", alone)
        (Path(name) / "daemons").mkdir()
        with slurm(Path(name) / "daemons") as found:
            slurm_goes_on(Path(name) / "slurm", alone, found)
    show("all as docs/scale.md says", "torchrun on two hosts, a process killed; SLURM on two hosts, queued again")


if __name__ == "__main__":
    main()
