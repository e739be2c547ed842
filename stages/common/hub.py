"""Models and tokenizers by folder or Hugging Face id: nothing is downloaded unless a setting names it."""

import os

from stages.common.errors import UserError, one_line


def is_local(key: str, name: str, *files: str) -> bool:
    """Whether a model or tokenizer is on this machine; otherwise, that it can be downloaded is checked
    once and quickly, since transformers would try for a minute.

    Args:
        key: the setting that names it.
        name: a folder, or a Hugging Face id.
        files: one of them is the largest of its files, the last one to be cached.
    Raises:
        UserError: no such folder; an id that is not cached and can't be downloaded.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if os.path.isdir(name) or any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
            return True
        HfApi().model_info(name, timeout=10)
        return False
    except Exception as error:  # a name that can't be an id, no network, no such id, no access to it
        raise UserError(
            f"{key}: {name!r} is neither a folder nor a Hugging Face id that is cached or can be downloaded: "
            f"{one_line(error)}"
        ) from None
