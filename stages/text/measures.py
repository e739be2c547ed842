"""How many documents a split has and how long they are, and which held-out n-grams stand among them, in tasks."""

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from stages.common.commands import progress_bar
from stages.common.settings import Runtime
from stages.text.corpus import Documents
from stages.text.engine import in_tasks
from stages.text.leakage import Grams, Seen, parts

import numpy as np

MEASURED = "measured.npz"


@dataclass
class Measured:
    """
    Args:
        sums: documents, bytes and words: (3,) int64.
        longest: bytes of the longest document.
        lengths: how many documents have up to 2**i bytes, by i: (64,) int64.
    """

    sums: np.ndarray
    longest: int
    lengths: np.ndarray

    def figures(self) -> dict[str, int]:
        sums = dict(zip(("documents", "bytes", "words"), self.sums.tolist()))
        return sums | {"longest": self.longest}


def measure(documents: Documents, share: range | None = None, seen: Seen | None = None) -> Measured:
    """Measures all documents of a split, or some of its record batches."""
    count = size = words = longest = 0
    lengths = np.zeros(64, np.int64)
    with progress_bar(documents.size, "measuring") as bar:
        for batch in documents.read(share):
            each = np.diff(batch.offsets)
            count, size, longest = count + len(each), size + int(each.sum()), max(longest, int(each.max()))
            lengths += np.bincount(np.ceil(np.log2(each)).astype(int), minlength=64)
            for part in parts(batch):
                words += part.count_words()
                if seen:
                    seen.look(part)
            bar.update(int(each.sum()))
    return Measured(np.array([count, size, words]), longest, lengths)


def measure_train(train: Documents, seen: Seen, identity: str, runtime: Runtime) -> Measured:
    """Measures the training text.

    Args:
        seen: the held-out n-grams to look for; those that stand in it are marked.
        identity: tells one corpus from another.
        runtime: in how many tasks, and who runs them.
    """
    place = train.path.parent.with_name(".measured.tmp")
    place.mkdir(exist_ok=True)
    np.save(held_out := place / "held_out.npy", seen.hashes)
    work = partial(measure_share, train=train.path, held_out=held_out, grams=seen.grams, identity=identity)
    with in_tasks(work, place, [], runtime) as parts:
        shares = [dict(np.load(part / MEASURED, allow_pickle=False)) for part in parts]
    shutil.rmtree(place)
    seen.seen = np.any([share["seen"] for share in shares], axis=0)
    sums, lengths = (np.sum([share[name] for share in shares], axis=0) for name in ("sums", "lengths"))
    return Measured(sums, max(int(share["longest"]) for share in shares), lengths)


def measure_share(
    folder: Path, rank: int, tasks: int, train: Path, held_out: Path, grams: Grams, identity: str
) -> None:
    """Measures the share of one task."""
    documents, seen = Documents(train.stem, train.parent), Seen(grams, np.load(held_out))
    measured = measure(documents, documents.share(rank, tasks), seen)
    np.savez(folder / MEASURED, **vars(measured), seen=seen.seen)
