"""What every stage needs. Imported first by each stage, so that its packages are there.

`.venv/bin/dvc repro` without the environment activated starts stages with another Python: then they
go on in the project's own. `dvc exp run --temp` and queued runs work in a folder below the project.
"""

import gc
import importlib.util
import os
import sys
from pathlib import Path

# Libraries make millions of objects that stay: to look through them again and again is a fifth of a stage's start.
USUAL_GC = gc.get_threshold()
gc.set_threshold(50_000)

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns of find_unused_parameters, which is set on purpose
if "OMP_WAIT_POLICY" not in os.environ:
    # Threads that wait for another spin a third as long as usual: beside other busy processes it may not be running.
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")

if importlib.util.find_spec("jsonargparse") is None:
    for folder in (Path.cwd(), *Path.cwd().parents):
        python = folder / ".venv/bin/python"
        if python.exists() and Path(sys.prefix) != folder / ".venv":
            os.execv(python, [str(python), *sys.orig_argv[1:]])
    sys.exit(f"{sys.executable} lacks this project's packages: activate its environment (. .venv/bin/activate)")
