"""Tokenizers: from folders and the hub, what identifies one, and whether it gives the exact text back."""

import hashlib
import json
from pathlib import Path

from stages.common.errors import UserError, one_line
from stages.common.hub import is_local

from tokenizers import Tokenizer, decoders, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast


def existing(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face id or folder.

    Raises:
        UserError: it can't be had or read, is no fast tokenizer, or has no end-of-text token.
    """
    key = "tokenizer.tokenizer_model"
    local = is_local(key, name, "tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    except Exception as error:  # the hub, the files and the tokenizer's own code each raise their own
        why = one_line(error)
        raise UserError(f"{key}: {name!r} holds no working tokenizer ({why}): use another, or null") from None
    if not tokenizer.is_fast:
        raise UserError(f"{key}: {name!r} has no tokenizer.json: convert it with transformers first")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{key}: {name!r} has no end-of-text token: set eos_token in its tokenizer_config.json")
    return tokenizer


def load_tokenizer(folder: str | Path) -> tuple[Tokenizer, int, str]:
    """The tokenizer of a folder, its end-of-text id and its fingerprint.

    Text that spells a special token is encoded as the text that it is.

    Raises:
        UserError: the folder holds no tokenizer that works.
    """
    try:
        raw = Path(folder, "tokenizer.json").read_bytes()
        tokenizer = Tokenizer.from_buffer(raw)
        config = json.loads(Path(folder, "tokenizer_config.json").read_text(encoding="utf-8"))
        end_of_text = config["eos_token"]
        end_of_text = end_of_text["content"] if isinstance(end_of_text, dict) else end_of_text
    except Exception as error:  # tokenizers raises plain Exception
        why = one_line(error)
        raise UserError(f"{folder}: no working tokenizer ({why}): make it again with `dvc repro`") from None
    end_of_text_id = tokenizer.token_to_id(str(end_of_text))
    if end_of_text_id is None:
        raise UserError(f"{folder}: its end-of-text token {end_of_text!r} is not in its vocabulary")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer, end_of_text_id, fingerprint(tokenizer, end_of_text_id)


def fingerprint(tokenizer: Tokenizer, end_of_text_id: int) -> str:
    """Of what decides the token ids: however often a tokenizer is saved anew, it stays the same."""
    state = json.loads(tokenizer.to_str())
    for key in ("version", "truncation", "padding", "post_processor"):
        state.pop(key, None)
    state["end_of_text_id"] = end_of_text_id
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def vocab_size_of(tokenizer: Tokenizer) -> int:
    """One more than the highest id: what an embedding must hold (ids may have gaps)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def loses_no_byte(tokenizer: Tokenizer) -> bool:
    """Whether its kind guarantees that decoding gives the exact text: byte-level, and nothing normalized."""
    return (
        tokenizer.normalizer is None
        and isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
        and not tokenizer.pre_tokenizer.add_prefix_space
        and isinstance(tokenizer.decoder, decoders.ByteLevel)
        and set(pre_tokenizers.ByteLevel.alphabet()) <= tokenizer.get_vocab().keys()
    )


def check_round_trip(tokenizer: Tokenizer, batch: list, ids: list[list[int]], path: str) -> None:
    for (piece, _, end), decoded in zip(batch, tokenizer.decode_batch(ids, skip_special_tokens=False)):
        if decoded != piece:
            at = next((i for i, (a, b) in enumerate(zip(piece, decoded)) if a != b), min(len(piece), len(decoded)))
            offset = end - len(piece[at:].encode())
            raise UserError(
                f"{path}: at byte offset {offset:,}, the tokenizer gives back {decoded[at : at + 10]!r} "
                f"for {piece[at : at + 10]!r}: set tokenizer.tokenizer_model to one that loses nothing"
            )
