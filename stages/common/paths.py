"""Where things lie, from the project's folder (docs/development.md draws it)."""

from pathlib import Path

SPLITS = ("train", "valid", "test")
SAMPLE = Path("data/sample")
CORPUS = Path("data/corpus")
BLOCKS = Path("data/blocks")
TOKENIZER = Path("models/tokenizer")
MODEL = Path("models/gpt2")
CHECKPOINTS = Path("models/checkpoints")
METRICS = Path("metrics")
LOGS = Path("logs")
