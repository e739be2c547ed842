"""Makes data/corpus/, the documents of each split, and metrics/corpus.json: what they are and what leaks."""

import hashlib
import os

from stages.common.errors import note, run
from stages.common.files import new_folder, write_json
from stages.common.hub import check_watched
from stages.common.params import load
from stages.common.paths import CORPUS, METRICS, SPLITS
from stages.common.settings import Runtime
from stages.text.corpus import Documents
from stages.text.leakage import Grams, Seen
from stages.text.measures import measure, measure_train
from stages.text.splits import sources_of, written_splits

import numpy as np

WORST_DOCUMENTS = 5
LEAKAGE_NOTE = 0.01


def main() -> None:
    settings = load("stages.prepare_corpus", __doc__)
    names = sources_of(settings.data)
    for name, path in names.items():
        if os.path.exists(path):  # of a data set of the hub, DVC watches the name
            check_watched(f"data.{name}_file" if name in SPLITS else f"data.test_files.{name}", path)
    if names["valid"] == names["test"] != names["train"]:
        note(f"{names['test']} is the text of both valid and test: each has half of its documents")
    with new_folder(CORPUS) as folder:
        with written_splits(settings.data, folder, names, settings.runtime) as (dropped, hashes):
            figures = describe({name: Documents(name, folder) for name in names}, hashes, dropped, settings.runtime)
        # Both or neither: a failure here leaves the corpus of before too.
        write_json(METRICS / "corpus.json", figures)
    for name, row in figures["sets"].items():
        print(f"{name}: {row['documents']:,} documents, {row['bytes']:,} bytes, {row['words']:,} words")
    for name, row in figures["leakage"].items():
        if max(row["documents"], row["ngrams"]) > LEAKAGE_NOTE:
            note(
                f"{name} leaks into train: {row['documents']:.1%} of its documents and {row['ngrams']:.1%} of "
                f"its n-grams ({figures['ngram']}) stand there word for word: see data.deduplicate"
            )


def describe(
    splits: dict[str, Documents], hashes: dict[str, np.ndarray], dropped: dict[str, int], runtime: Runtime
) -> dict:
    """What metrics/corpus.json holds.

    Returns:
        sets: documents, bytes, words, duplicates (documents that an earlier one of the split equals), dropped (by
            data.deduplicate), the longest document's bytes and a hash of the documents in order, of each split.
        ngram: what an n-gram is: 13 words or 50 bytes.
        leakage: of each split but train, the share of documents and of n-grams that stand in train, and the
            documents (numbered from 1) with the largest share.
        lengths: share of a split's documents by length; `bytes` is the upper bound.
    """
    held_out = [name for name in splits if name != "train"]
    measured = {name: measure(splits[name]) for name in held_out}
    identities = {name: identity(hashes[name]) for name in splits}
    _, size, words = sum(each.sums for each in measured.values()).tolist()
    grams = Grams.of(words, size)
    seen = Seen(grams, grams.of_documents([splits[name] for name in held_out]))
    measured["train"] = measure_train(splits["train"], seen, repr(identities), runtime)
    leakage = {}
    for name in held_out:
        total, found = np.hstack([seen.by_document(batch) for batch in splits[name].read()])
        share = found / np.maximum(total, 1)
        worst = [i for i in np.argsort(-share, kind="stable")[:WORST_DOCUMENTS] if share[i]]
        leakage[name] = {
            "documents": float(np.isin(hashes[name], hashes["train"]).mean()),
            "ngrams": float(found.sum() / max(total.sum(), 1)),
            "worst": {f"document {i + 1}": float(share[i]) for i in worst},
        }
    return {
        "sets": {name: measured[name].figures() | identities[name] | {"dropped": dropped[name]} for name in splits},
        "ngram": grams.name,
        "leakage": leakage,
        "lengths": shares_by_length({name: measured[name].lengths for name in splits}),
    }


def shares_by_length(lengths: dict[str, np.ndarray]) -> list[dict]:
    """A row for each length of document that a split has, or that lies between two of them."""
    present = np.flatnonzero(sum(lengths.values())).tolist()
    shares = {name: each / each.sum() for name, each in lengths.items()}
    return [
        {"bytes": 1 << i, **{name: float(share[i]) for name, share in shares.items()}}
        for i in range(present[0], present[-1] + 1)
    ]


def identity(hashes: np.ndarray) -> dict:
    duplicates = len(hashes) - len(np.unique(hashes))
    return {"duplicates": duplicates, "sha256": hashlib.sha256(hashes.tobytes()).hexdigest()}


if __name__ == "__main__":
    run(main)
