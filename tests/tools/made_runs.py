"""Runs as the pipeline would have left them in Git, made in no time."""

import hashlib
import json
import math
from pathlib import Path

from tools.runs import Run

import numpy as np
import pandas as pd
import yaml
from conftest import run

BYTES = np.rint(np.random.default_rng(5).lognormal(7.5, 0.6, 40))


def repository(folder: Path) -> None:
    for words in (("init", "-q", "-b", "main"), ("config", "user.email", "t@e"), ("config", "user.name", "T")):
        run("git", *words, cwd=folder)


def made(difference: float, seed: int = 1, rows: int = 40, spread: float = 0.02, **details) -> Run:
    """A run whose nats a byte are `difference` above those of made(0), on test and on another test set, news."""
    random, size = np.random.default_rng([seed, int(1e6 * abs(difference))]), np.resize(BYTES, rows)
    nll = size * (0.9 + difference + random.normal(0, spread, rows))
    table = np.stack([np.arange(rows) + 1, size / 4, size, size / 5, nll], axis=1)
    bits = nll.sum() / size.sum() / math.log(2)
    details = {"text": "t", "stride": 16, "tokenizer": "k", "changed_documents": 0} | details
    details |= {"ppl_low": 30.0, "ppl_high": 40.0}
    figures = {"bits_per_byte": bits, "ppl": math.exp(nll.sum() / table[:, 1].sum()), "loss": 1.0}
    return Run(
        f"{seed}-{difference}",
        None,
        "here",
        "",
        figures={"test": figures, "news": figures, "valid": figures},
        details={"test": details, "news": details},
        documents={"test": table, "news": table},
        params={"seed_everything": seed},
    )


def write(project: Path, made_run: Run, **params) -> None:
    """A run's figures as the pipeline writes them, with a dvc.lock that records them."""
    columns = ["document", "tokens", "bytes", "words", "nll"]
    rows = [pd.DataFrame(table, columns=columns).assign(set=name) for name, table in made_run.documents.items()]
    figures = json.dumps(made_run.figures)
    timing = {"parameters": 1000, "tokens": 5000, "train_seconds": 3.0, "tokens_per_second": 1700}
    lock = {
        "params": {"params.yaml": {"seed_everything": made_run.params["seed_everything"], **params}},
        "deps": [{"path": "text.txt", "md5": made_run.details["test"]["text"]}],
        "outs": [{"path": "metrics/eval.json", "md5": hashlib.md5(figures.encode()).hexdigest()}],
    }
    (project / "metrics").mkdir(exist_ok=True)
    (project / "metrics/eval.json").write_text(figures)
    (project / "metrics/details.json").write_text(json.dumps(made_run.details))
    (project / "metrics/run.json").write_text(json.dumps(timing))
    (project / "metrics/documents.csv").write_text(pd.concat(rows)[["set", *columns]].to_csv(index=False))
    (project / "dvc.lock").write_text(yaml.safe_dump({"stages": {"all": lock}}))
    (project / "metrics/corpus.json").write_text(json.dumps({"leakage": {"test": {"ngrams": 0.02}}}))
    (project / "metrics/train.csv").write_text("step,tokens,train_loss\n1,64,9.0\n2,128,3.0\n")
    valid = f"step,tokens,valid_loss\n1,64,9.0\n2,128,{made_run.number('test', 'ppl') / 10}\n"
    (project / "metrics/valid.csv").write_text(valid)
    (project / "metrics/samples.md").write_text(f'# Samples\n\nPrompt: "In"\n\n    In {made_run.revision}\n')


def commit(project: Path, made_run: Run, message: str, **params) -> str:
    write(project, made_run, **params)
    run("git", "add", "-A", cwd=project)
    run("git", "commit", "-qm", message, cwd=project)
    return run("git", "rev-parse", "HEAD", cwd=project).stdout.strip()
