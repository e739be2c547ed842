"""Models, tokenizers and text by path or Hugging Face id: nothing is downloaded unless a setting names it."""

import os
import re
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from stages.common.errors import UserError, one_line

import yaml


def is_local(key: str, name: str, *files: str) -> bool:
    """Whether a model or tokenizer is on this machine; otherwise, that it can be downloaded is checked
    once and quickly, since transformers would try for a minute.

    Args:
        key: the setting that names it.
        name: a folder, or a Hugging Face id.
        files: one of them is the largest of its files, the last one to be cached.
    Raises:
        UserError: no such folder, or one that DVC doesn't watch; an id that is not cached and can't be downloaded.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if os.path.isdir(name):
            check_watched(key, name)
            return True
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
            return True
        HfApi().model_info(name, timeout=10)
        return False
    except UserError:
        raise
    except Exception as error:  # a name that can't be an id, no network, no such id, no access to it
        raise UserError(
            f"{key}: {name!r} is neither a folder nor a Hugging Face id that is cached or can be downloaded: "
            f"{one_line(error)}"
        ) from None


@cache
def dataset_files(name: str) -> list[str] | None:
    """The files of a data set of the Hugging Face hub in sorted order, downloaded where they aren't cached.

    Args:
        name: `owner/name` for its .txt, .jsonl, .csv and .parquet, or a part of it: `owner/name/data/train-*`.
    Returns:
        None where that can't be a data set's name, or is a path below a folder that is here.
    Raises:
        UserError: it is neither cached nor can it be downloaded.
    """
    from huggingface_hub import snapshot_download

    match = re.fullmatch(r"([\w.-]+)(/[\w.-]+)(?:/(.+))?", name)
    if not match or os.path.exists(match[1]):
        return None
    wanted = [match[3], f"{match[3]}/*"] if match[3] else [f"*.{kind}*" for kind in ("txt", "jsonl", "csv", "parquet")]
    try:
        folder = snapshot_download(match[1] + match[2], repo_type="dataset", allow_patterns=wanted, etag_timeout=10)
    except Exception as error:  # no network, no such id, no access to it
        raise UserError(
            f"{name}: no such file or folder, nor a Hugging Face data set that is cached or can be downloaded "
            f"({one_line(error)}): set the data group of params.yaml to your text"
        ) from None
    files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
    return [str(file) for file in files if any(fnmatch(str(file.relative_to(folder)), part) for part in wanted)]


def check_watched(key: str, path: str) -> None:
    """Run by DVC, a stage may read only what DVC watches, or a change in it would rerun nothing."""
    if stage := os.environ.get("DVC_STAGE"):
        deps = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"][stage]["deps"]
        if f"${{{key}}}" not in deps and os.path.normpath(path) not in map(os.path.normpath, deps):
            raise UserError(
                f"params.yaml: {key}: DVC doesn't watch {path}: add `- {path}` to the deps of {stage} in dvc.yaml"
            )
