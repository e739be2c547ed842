"""Tokenizers: from folders and the hub, how they make token ids of text, and what identifies one."""

import hashlib
import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from stages.common.errors import UserError, note, one_line
from stages.common.hub import is_local

import numpy as np
import sentencepiece
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

SENTENCEPIECE_FILE = "spiece.model"
# The roles that tokens may have in tokenizer_config.json.
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# GPT-2's pattern (https://github.com/openai/gpt-2, src/encoder.py) never joins a visible character with white
# space after it, nor a letter with a punctuation mark of East Asia: a cut there changes no token, with NFKC too.
SAFE_CUT = re.compile(r"\S(?=[ \n])|[ぁ-ゖァ-ヺー一-鿿가-힣](?=[、。「」『』])")
COMPARED_BYTES = 1 << 22
# Where tokenizers and their conversions are known to differ.
HARD_TEXTS = (
    "It's we'll I'D don''t  two   spaces\ttab\r\nline\n\n\n lines \n",
    " leading and trailing ",
    "\n\t x = {'a': [1, 23, 456, 7890], \"b\": 3.14e-10};  // 12345678 ABCdefGHI snake_case $%&",
    "ＡＢＣ　１２３ ﾊﾝｶｸ ｶﾞ か\u3099 が ㍿ ① ﬁ ½ ²  今日は良い天気です。「鬱」吾輩は猫である、名前はまだ無い。",
    "e\u0301 é A\u030a Å ô\u0323 \u1100\u1161\u11a8 각 नमस्ते สวัสดี مرحبا שָׁלוֹם Привет ελληνικά",
    "👩‍💻 🇯🇵 ❤️ 👍🏽 \ufeff\ufffd\u200b\u00a0\u00ad\u2028\x00\x01\x7f\x85\uffff\U0010ffff\U0001fae8",
    "▁ ▁▁a Ġ Ċ <0x0A> ## @@ </w> <s> </s> <unk> <pad> [SEP] <|endoftext|> <|im_start|><extra_id_0>",
    "a" * 300 + " " * 40 + "=" * 90 + "あ" * 70,
)


class TextTokenizer(ABC):
    """A tokenizer as this project uses it. Text that spells a control token is encoded as the text that it is.

    Args:
        vocab: the id of each token.
        end_of_text: id of the token between documents.
        unknown: id of the token for what the vocabulary lacks, if there is one.
        fingerprint: a hash of what decides the token ids.
        loses_nothing: whether its kind guarantees that decoding gives the exact text.
        cut: where a document may be cut without a change to its ids; None: nowhere.
    """

    vocab: dict[str, int]
    end_of_text: int
    unknown: int | None
    fingerprint: str
    loses_nothing = False
    cut: re.Pattern | None = None

    @property
    def vocab_size(self) -> int:
        """One more than the highest id: what an embedding must hold (ids may have gaps)."""
        return max(self.vocab.values()) + 1

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts, (N,) uint32, and where in them each text ends, (len(texts),) int64."""

    def speed_up(self) -> None:  # noqa: B027
        """Uses a faster library from now on, where one is proven to give the same ids."""

    @abstractmethod
    def decode_batch(self, ids: list[list[int]]) -> list[str]:
        """The text of each list of ids, control tokens spelled out."""

    def decode(self, ids: list[int]) -> str:
        return self.decode_batch([ids])[0]

    @abstractmethod
    def save(self, folder: str | Path, config: dict) -> None:
        """Writes what `load_tokenizer` and AutoTokenizer read.

        Args:
            config: the roles of tokens, as in tokenizer_config.json.
        """


class JsonTokenizer(TextTokenizer):
    """A tokenizer.json, by the tokenizers library."""

    def __init__(self, tokenizer: Tokenizer, end_of_text: str, control: set[str]):
        """
        Args:
            end_of_text: the token between documents.
            control: tokens that text never becomes, beside the special ones of tokenizer.json.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        state = json.loads(tokenizer.to_str())
        if state["model"].get("dropout") is not None:
            state["model"]["dropout"] = None
            tokenizer = Tokenizer.from_str(json.dumps(state))
        self.tokenizer, self.state, self.vocab = tokenizer, state, tokenizer.get_vocab(with_added_tokens=True)
        self.end_of_text = self.vocab[end_of_text]
        self.fingerprint = fingerprint(state, self.end_of_text)
        self.loses_nothing, self.cut = loses_nothing(state), SAFE_CUT if has_safe_cuts(state) else None
        unknown = unknown_token(state["model"])
        self.unknown = self.vocab.get(unknown)
        control = {end_of_text} | control | {token["content"] for token in state["added_tokens"] if token["special"]}
        self.encoder = Tokenizer.from_str(json.dumps(out_of_reach(state, control)))
        self.encoder.encode_special_tokens = True
        self.control, self.fast, self.compared = sorted(control), None, 0
        with silent_rust():  # a regular expression that never ends gives up here
            self.encode_batch_slowly(HARD_TEXTS)

    def speed_up(self) -> None:
        """Uses fastokens if its ids are the same for HARD_TEXTS and, later, for the first COMPARED_BYTES of text."""
        try:
            import fastokens

            self.fast = fastokens.Tokenizer.from_json_str(self.encoder.to_str())
            self.encode_batch([*HARD_TEXTS, *(f"a {token}{token} b\n{token}" for token in self.control)])
        except Exception as error:  # not for this machine, or not for this kind of tokenizer
            self.slow_down(one_line(error))

    def slow_down(self, why: str) -> None:
        self.fast = None
        note(f"encoding by tokenizers, not by the faster fastokens: {why}")

    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if self.fast is None:
            return self.encode_batch_slowly(texts)
        try:
            ids, ends = self.fast.encode_batch_flat(texts, split_special_tokens=True)
        except ValueError as error:  # a regular expression that doesn't end here; tokenizers' may
            with silent_rust():
                result = self.encode_batch_slowly(texts)
            self.slow_down(one_line(error))
            return result
        result = np.frombuffer(ids, np.uint32), np.frombuffer(ends, np.uint64)[1:].astype(np.int64)
        if self.compared < COMPARED_BYTES:
            self.compared += sum(map(len, texts))
            same = self.encode_batch_slowly(texts)
            if not all(map(np.array_equal, result, same)):
                self.slow_down("its ids differ for this tokenizer and text")
                return same
        return result

    def encode_batch_slowly(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return joined([each.ids for each in self.encoder.encode_batch_fast(texts, add_special_tokens=False)])

    def decode_batch(self, ids: list[list[int]]) -> list[str]:
        return self.tokenizer.decode_batch(ids, skip_special_tokens=False)

    def save(self, folder: str | Path, config: dict) -> None:
        self.tokenizer.save(str(Path(folder, "tokenizer.json")))
        # transformers 5 would write TokenizersBackend, which transformers 4 doesn't know.
        write_config(folder, {"tokenizer_class": "PreTrainedTokenizerFast", **config})


class SentencePieceTokenizer(TextTokenizer):
    """A SentencePiece model, by its own library: conversions to tokenizer.json normalize some texts otherwise."""

    def __init__(self, path: str | Path, end_of_text: str, control: set[str]):
        self.path, raw = path, Path(path).read_bytes()
        self.model = sentencepiece.SentencePieceProcessor(model_proto=out_of_reach_of_sentencepiece(raw, control))
        self.vocab = {self.model.id_to_piece(i): i for i in range(self.model.get_piece_size())}
        self.end_of_text, self.unknown = self.vocab[end_of_text], self.model.unk_id()
        self.fingerprint = hashlib.sha256(raw + str(self.end_of_text).encode()).hexdigest()

    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return joined(self.model.encode(texts, out_type=int, num_threads=1))

    def decode_batch(self, ids: list[list[int]]) -> list[str]:
        return self.model.decode(ids)

    def save(self, folder: str | Path, config: dict) -> None:
        shutil.copyfile(self.path, Path(folder, SENTENCEPIECE_FILE))
        # The class of transformers 4 and 5 that takes its ids from SentencePiece itself. It would add a sep_token.
        config = {"sep_token": config["eos_token"], **config}
        write_config(folder, {"tokenizer_class": "BertGenerationTokenizer", **config})


def joined(ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of some texts one after the other, (N,) uint32, and where each text ends, (n,) int64."""
    ends = np.cumsum([len(each) for each in ids], dtype=np.int64)
    return np.fromiter(chain.from_iterable(ids), np.uint32, ends[-1]), ends


def write_config(folder: str | Path, config: dict) -> None:
    text = json.dumps({"clean_up_tokenization_spaces": False, **config}, indent=2, ensure_ascii=False)
    Path(folder, "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def copy_tokenizer(source: str | Path, target: str | Path, block_size: int) -> None:
    """Puts a folder's tokenizer beside the model that knows texts of up to block_size tokens."""
    for name in ("tokenizer.json", SENTENCEPIECE_FILE):
        if Path(source, name).exists():
            shutil.copyfile(Path(source, name), Path(target, name))
    config = json.loads(Path(source, "tokenizer_config.json").read_text(encoding="utf-8"))
    write_config(target, config | {"model_max_length": block_size})


def load_tokenizer(folder: str | Path) -> TextTokenizer:
    """The tokenizer of a folder.

    Raises:
        UserError: the folder holds no tokenizer that works.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        tokens = {role: config[role] for role in ROLES if config.get(role)}
        tokens = {role: token["content"] if isinstance(token, dict) else token for role, token in tokens.items()}
        end_of_text = tokens["eos_token"]
        if (folder / "tokenizer.json").exists() or not (folder / SENTENCEPIECE_FILE).exists():
            raw = (folder / "tokenizer.json").read_bytes()
            return JsonTokenizer(Tokenizer.from_buffer(raw), end_of_text, set(tokens.values()))
        return SentencePieceTokenizer(folder / SENTENCEPIECE_FILE, end_of_text, set(tokens.values()))
    except Exception as error:  # tokenizers raises plain Exception
        if isinstance(error, KeyError) and "end_of_text" in locals():
            raise UserError(f"{folder}: its end-of-text token {end_of_text!r} is not in its vocabulary") from None
        raise UserError(f"{folder}: no working tokenizer ({one_line(error)}): make it again with `dvc repro`") from None


def existing(key: str, name: str, texts: Iterable[str] = ()) -> tuple[TextTokenizer, dict]:
    """The tokenizer of a Hugging Face id or folder, as its files say, and the roles of its tokens.

    Args:
        key: the setting that names it.
        texts: where AutoTokenizer's ids are compared with it, beside HARD_TEXTS.
    Raises:
        UserError: it can't be had or read, or has no end-of-text token.
    """
    local = is_local(key, name, "tokenizer.json", SENTENCEPIECE_FILE)
    try:
        auto = AutoTokenizer.from_pretrained(name, local_files_only=local, trust_remote_code=False)
        tokens = {role: str(getattr(auto, role)) for role in ROLES if getattr(auto, role, None)}
        if auto.eos_token_id is None:
            raise UserError(f"{key}: {name!r} has no end-of-text token: set eos_token in its tokenizer_config.json")
        tokenizer, source = of_files(name, auto, tokens)
    except UserError:
        raise
    except Exception as error:  # the hub, the files and the tokenizer's own code each raise their own
        why = one_line(error)
        raise UserError(f"{key}: {name!r} holds no working tokenizer ({why}): use another, or null") from None
    if tokenizer is None:
        raise UserError(f"{key}: {name!r} has no tokenizer.json: convert it with transformers first")
    if tokenizer.unknown == tokenizer.end_of_text and not tokenizer.loses_nothing:
        why = "has one token for end-of-text and for what it doesn't know: set another eos_token"
        raise UserError(f"{key}: {name!r} {why}")
    if auto.is_fast and getattr(auto.backend_tokenizer.model, "dropout", None):
        auto.backend_tokenizer.model.dropout = None
        note(f"{key}: {name!r} drops merges at random (dropout): this is off here")
    special = auto.get_added_vocab()  # control tokens to AutoTokenizer where a text spells them
    texts = (text for text in chain(HARD_TEXTS, texts) if not any(token in text for token in special))
    with silent_rust():
        differs = any(auto.encode(text, add_special_tokens=False) != tokenizer.encode(text) for text in texts)
    if differs:
        note(
            f"{key}: transformers' {type(auto).__name__} gives other ids than the {source} of {name!r}: "
            f"those of {source} are used"
        )
    return tokenizer, {role: token for role, token in tokens.items() if token in tokenizer.vocab}


@contextmanager
def silent_rust() -> Iterator[None]:
    """Where a tokenizer may give up on a text: Rust says so on standard error, and `errors.run` then says it better."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def of_files(name: str, auto: PreTrainedTokenizerBase, tokens: dict[str, str]) -> tuple[TextTokenizer | None, str]:
    """The tokenizer that a folder's or id's files hold, and the file it is from. What AutoTokenizer makes of
    them may differ: transformers 5 builds some classes anew from the vocabulary, without the file's other parts.

    Args:
        auto: what AutoTokenizer makes of them.
        tokens: the roles of its tokens.
    """
    control = set(tokens.values())
    if path := file_of(name, "tokenizer.json"):
        return JsonTokenizer(Tokenizer.from_file(path), tokens["eos_token"], control), "tokenizer.json"
    for file in type(auto).vocab_files_names.values():
        if file.endswith(".model") and (path := file_of(name, file)):
            tokenizer = SentencePieceTokenizer(path, tokens["eos_token"], control)
            pieces = [piece for piece, i in tokenizer.vocab.items() if not tokenizer.model.is_control(i)]
            same = auto.convert_tokens_to_ids(pieces) == [tokenizer.vocab[piece] for piece in pieces]
            added = [t.content for t in auto.added_tokens_decoder.values() if not t.special]
            if same and set(added) <= tokenizer.vocab.keys():
                return tokenizer, file
    if auto.is_fast:
        return JsonTokenizer(auto.backend_tokenizer, tokens["eos_token"], control), "vocabulary"
    return None, ""


def file_of(name: str, file: str) -> str | None:
    """The path of a folder's file, or of a cached id's."""
    from huggingface_hub import try_to_load_from_cache

    path = os.path.join(name, file) if os.path.isdir(name) else try_to_load_from_cache(name, file)
    return path if isinstance(path, str) and os.path.isfile(path) else None


def encodes_alike(one: TextTokenizer, other: TextTokenizer) -> bool:
    """Whether two tokenizers have one vocabulary, and the same ids for HARD_TEXTS."""
    same = one.vocab == other.vocab and one.end_of_text == other.end_of_text
    return same and all(one.encode(text) == other.encode(text) for text in HARD_TEXTS)


def fingerprint(state: dict, end_of_text: int) -> str:
    """Of what decides the token ids: however often a tokenizer is saved anew, it stays the same."""
    state = {k: v for k, v in state.items() if k not in ("version", "truncation", "padding", "post_processor")}
    return hashlib.sha256(json.dumps(state | {"end_of_text_id": end_of_text}, sort_keys=True).encode()).hexdigest()


def unknown_token(model: dict) -> str | None:
    if model["type"] == "Unigram":
        return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def out_of_reach(state: dict, control: set[str]) -> dict:
    """A tokenizer whose model can't make control tokens of text that spells them: their names are changed to ones
    that no text has. A Unigram vocabulary would match them, and BPE could merge their letters.

    Args:
        state: the content of a tokenizer.json.
    """
    model = dict(state["model"])
    if model["type"] == "Unigram":
        names = {token for token, _ in model["vocab"]} & control
        model["vocab"] = [[hidden(token) if token in names else token, score] for token, score in model["vocab"]]
    else:
        names = (model["vocab"].keys() & control) - {model.get("unk_token")}
        model["vocab"] = {hidden(token) if token in names else token: i for token, i in model["vocab"].items()}
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if not names & {*pair, "".join(pair)}]
    return state | {"model": model, "added_tokens": [t for t in state["added_tokens"] if t["content"] not in names]}


def out_of_reach_of_sentencepiece(raw: bytes, control: set[str]) -> bytes:
    """A SentencePiece model in which `control` are control tokens, which it makes of no text."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(raw)
    changed = [
        piece for piece in proto.pieces if piece.piece in control and piece.type in (piece.NORMAL, piece.USER_DEFINED)
    ]
    for piece in changed:
        piece.type = piece.CONTROL
    return proto.SerializeToString() if changed else raw


def hidden(token: str) -> str:
    """A name that no text has: eight characters that stand for none come first."""
    return f"{chr(0x10FFFE) * 8}{token}"


def parts(component: dict | None, key: str) -> list[dict]:
    """A normalizer or pre-tokenizer as the list of what it does."""
    if component is None:
        return []
    return component[key] if component["type"] == "Sequence" else [component]


def loses_nothing(state: dict) -> bool:
    """Whether its kind guarantees that decoding gives the exact text: every byte has a token, and nothing is
    normalized or left out.

    Args:
        state: the content of a tokenizer.json.
    """
    model = state["model"]
    *splits, last = parts(state["pre_tokenizer"], "pretokenizers") or [{"type": None}]
    vocabulary = {token for token, _ in model["vocab"]} if model["type"] == "Unigram" else model["vocab"].keys()
    return (
        state["normalizer"] is None
        and model["type"] in ("BPE", "Unigram")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and last["type"] == "ByteLevel"
        and not last["add_prefix_space"]
        and all(split["type"] == "Split" and split["behavior"] != "Removed" for split in splits)
        and (state["decoder"] or {}).get("type") == "ByteLevel"
        and all(token["special"] for token in state["added_tokens"])
        and set(pre_tokenizers.ByteLevel.alphabet()) <= vocabulary
    )


def has_safe_cuts(state: dict) -> bool:
    """Whether the tokenizer splits by GPT-2's pattern, so that SAFE_CUT changes no token.

    Args:
        state: the content of a tokenizer.json.
    """
    split = state["pre_tokenizer"] or {"type": None}
    return (
        state["normalizer"] in (None, {"type": "NFKC"})
        and split["type"] == "ByteLevel"
        and bool(split["use_regex"])
        and not split["add_prefix_space"]
        and all(token["special"] for token in state["added_tokens"])
    )
