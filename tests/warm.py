"""A `python` that runs modules in forks of one process that has their libraries loaded.

A stage then starts in a tenth of a second instead of three. All the rest is real: DVC runs the
commands of dvc.yaml, and each runs in a process of its own.

python tests/warm.py FOLDER: makes FOLDER/python and serves it until it is stopped.
"""

import ast
import atexit
import gc
import importlib
import os
import runpy
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path

# What libraries import as late as they can.
LATE = (
    "dulwich.porcelain",
    "dvc.cli",
    "dvc.commands.repro",
    "dvc.repo.experiments",
    "dvc.repo.reproduce",
    "dvc.scm",
    "dvclive",
    "omegaconf",
    "torch.utils.tensorboard",
)
CLIENT = """#!{python} -IS
import os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = repr((os.getcwd(), sys.argv[1:], dict(os.environ))).encode()
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(request)
    status = int(server.makefile().read() or 1)
sys.exit(status) if status >= 0 else os.kill(os.getpid(), -status)
"""


def main(folder: Path) -> None:
    gc.disable()
    import_libraries(Path(__file__).resolve().parent.parent / "stages")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen()
    client = folder / "python"
    client.write_text(CLIENT.format(python=sys.executable, address=str(folder / "socket")))
    client.chmod(0o755)
    gc.freeze()
    gc.enable()
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            break
        connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    listener.close()
    size, files, *_ = socket.recv_fds(connection, 8, 3)
    cwd, arguments, environment = ast.literal_eval(connection.makefile().read(int.from_bytes(size, "big")))
    if child := os.fork():
        connection.sendall(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
        os._exit(0)
    connection.close()
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0] = cwd
    sys.argv = arguments[1:]
    # Taking the libraries down object by object would cost more than the stage does.
    os._exit(status_of(arguments[1]))


def import_libraries(sources: Path) -> None:
    """All that the stages import, and DVC."""
    for file in sources.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)) and not ast.unparse(node).split()[1].startswith("stages"):
                exec(ast.unparse(node), {})
    preload()


def preload() -> None:
    """What libraries do once in a process, and late."""
    for name in LATE:
        importlib.import_module(name)
    from transformers import GPT2Config, GPT2LMHeadModel

    with tempfile.TemporaryDirectory() as folder:  # a thousand regular expressions
        GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder)


def status_of(module: str) -> int:
    """Runs a module as `python -m` does; returns its exit status."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        status = int(isinstance(stop.code, str)) or stop.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    return status


if __name__ == "__main__":
    main(Path(sys.argv[1]))
