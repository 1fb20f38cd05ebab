"""The two kinds of tokenizer file, made alike: pieces of text and control ids in, ids out; ids in, bytes out.

A *control token* (`<s>`, `[INST]`, `<|im_end|>`) steers the model; its spelling may also turn up in text that
somebody wrote. So a vocabulary never looks for controls in text: whoever encodes says which of them stand where,
as ids between pieces of text (`["Hi", 2, "there"]`). Text becomes ordinary tokens, whatever it spells.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from eightfold.types import EightfoldError

Pieces = Sequence[str | int]  # ordinary text, and the ids of control tokens

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_SPACE = "▁"  # how sentencepiece writes a space


class Spellings:
    """Finds texts that stand for ids in other text; where several begin at one place, the longest."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        """`ids` maps non-empty texts to what they stand for."""
        self.text_of = {token: text for text, token in ids.items()}
        self._ids = dict(ids)
        # (?!) matches nothing
        self._pattern = re.compile("|".join(map(re.escape, sorted(ids, key=len, reverse=True))) or "(?!)")

    def split(self, text: str) -> list[str | int]:
        """Cut a text at its finds: the text between them, and their ids."""
        pieces: list[str | int] = []
        end = 0
        for match in self._pattern.finditer(text):
            pieces += [text[end : match.start()], self._ids[match.group()]]
            end = match.end()
        return [piece for piece in (*pieces, text[end:]) if piece != ""]

    def first(self, texts: Iterable[str]) -> str | None:
        """The first find in any of several texts."""
        return next((match.group() for match in map(self._pattern.search, texts) if match), None)

    @cached_property
    def edges(self) -> frozenset[str]:
        """The characters with which these texts begin and end, such as < and >, but no letters or digits."""
        return frozenset(char for text in self._ids for char in (text[0], text[-1]) if not char.isalnum())

    @cached_property
    def without_edges(self) -> Spellings:
        """Those that begin and end like words."""
        return Spellings({text: i for text, i in self._ids.items() if self.edges.isdisjoint((text[0], text[-1]))})


class Vocabulary(Protocol):
    """What a tokenizer needs to know of its file."""

    size: int  # one more than the highest id
    controls: dict[str, int]  # how each control token is spelt → its id
    bos: str | None  # beginning and end of a sequence as this file alone names them
    eos: str | None
    strips_space: bool  # one space in front of a decoded text is the tokenizer's, not the text's

    def encode(self, pieces: Pieces) -> list[int]:
        """Ids of the pieces; the tokens that text gets are never controls. The text must be valid Unicode."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to a decoded text; nothing for ids that mean nothing."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no such file. Raises EightfoldError if it holds anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise EightfoldError(f"{path} can't be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise EightfoldError(f"{path} holds a JSON {type(data).__name__}; it must hold an object")
    return data


@dataclass(frozen=True, slots=True)
class FolderSettings:
    """What the small files beside a tokenizer say about it."""

    config: Mapping[str, Any]  # tokenizer_config.json
    named: Mapping[str, str | None]  # "bos_token" → "<s>"; None where a file says that there is none
    special: frozenset[str]  # spellings of tokens declared special
    added: Mapping[int, Mapping[str, Any]]  # id → its entry, in the form of tokenizer.json's added_tokens

    @classmethod
    def read(cls, folder: Path) -> FolderSettings:
        """Read the folder's files, absent ones as empty. Raises EightfoldError on one that can't be understood."""
        config = read_json(folder / "tokenizer_config.json")
        both = {**read_json(folder / "special_tokens_map.json"), **config}
        named = {name: _spelling(both[name], name) for name in _NAMED if name in both}
        special = {text for text in named.values() if text}
        for name in ("additional_special_tokens", "extra_special_tokens"):
            extra = both.get(name) or []
            special |= {_spelling(x, name) or "" for x in (extra.values() if isinstance(extra, dict) else extra)}
        return cls(config, named, frozenset(special - {""}), _added_entries(folder, config))

    def is_control(self, text: str, special: bool) -> bool:
        """Whether a token steers: declared special, or of the form <|…|>, which some files forget to declare."""
        return special or text in self.special or (len(text) > 4 and text.startswith("<|") and text.endswith("|>"))


def _spelling(value: object, name: str) -> str | None:
    """A token's text, which the files give as a string or as {"content": string}."""
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise EightfoldError(
            f"tokenizer_config.json: {name} is {value!r}; it must be a string or hold one as 'content'"
        )
    return text or None


def _added_entries(folder: Path, config: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    source, entries = "added_tokens.json", {}
    try:
        for text, token in read_json(folder / source).items():
            entries[int(token)] = {**plain, "id": int(token), "content": str(text)}
        source = "tokenizer_config.json (added_tokens_decoder)"
        for token, entry in (config.get("added_tokens_decoder") or {}).items():
            entries[int(token)] = {**plain, **entry, "id": int(token), "content": str(entry["content"])}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise EightfoldError(f"{folder / source} is not a table of added tokens and their ids") from None
    return entries


class JsonVocabulary:
    """A tokenizer.json, run by the `tokenizers` library.

    The library finds control tokens by their spelling, wherever it stands. So it is given a copy of the file in
    which each control has a secret spelling instead, new in each process: text can't contain it, and everything
    around it (spaces stripped, prefixes, normalization) works as the file says.
    """

    def __init__(self, path: Path, settings: FolderSettings) -> None:
        """Raises EightfoldError on a file that `tokenizers` refuses, or whose decoder is not implemented here."""
        data = read_json(path)
        try:
            added = _merge_added(data, settings, path)
            table = _table(data["model"]["vocab"])
            self._bytes_of, self.strips_space = _decoder(data.get("decoder"), path)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, EightfoldError):
                raise
            raise EightfoldError(f"{path} is not a tokenizer.json: {type(error).__name__}: {error}") from None
        self.controls: dict[str, int] = {
            e["content"]: t for t, e in added.items() if settings.is_control(e["content"], e["special"])
        }
        self.bos: str | None = "<s>" if "<s>" in self.controls else None
        self.eos: str | None = "</s>" if "</s>" in self.controls else None
        self._pieces: dict[int, str] = {token: text for text, token in table.items()}
        self._added: dict[int, str] = {token: entry["content"] for token, entry in added.items()}
        self.size = max([*self._pieces, *self._added]) + 1
        nonce = secrets.token_hex(8)
        self._secret = {token: f"\ufdd0{nonce}{token}\ufdd1" for token in self.controls.values()}
        self._tokenizer = self._build(data, added, path)

    def _build(self, data: dict[str, Any], added: Mapping[int, Mapping[str, Any]], path: Path) -> Any:
        from tokenizers import Tokenizer  # heavy: only when a tokenizer is really loaded

        _rename(data, {text: self._secret[token] for text, token in self.controls.items()})
        data["added_tokens"] = [
            {**e, "content": self._secret[t], "normalized": False, "single_word": False} if t in self._secret else e
            for t, e in sorted(added.items())
        ]
        if isinstance(data["model"]["vocab"], dict):  # pins the id, also where ids leave gaps
            data["model"]["vocab"].update({e["content"]: e["id"] for e in data["added_tokens"]})
        # <s> is put in front by Tokenizer; a request is never cut or padded; an encoding is never random
        data.update(post_processor=None, truncation=None, padding=None)
        data["model"]["dropout"] = None
        try:
            tokenizer = Tokenizer.from_str(json.dumps(data))
        except Exception as error:  # the library raises plain Exception
            raise EightfoldError(f"{path} is refused by the tokenizers library: {error}") from None
        for entry in data["added_tokens"]:
            if tokenizer.token_to_id(entry["content"]) != entry["id"]:
                raise EightfoldError(
                    f"{path}: the added token {self._added[entry['id']]!r} can't get its id {entry['id']}"
                )
        return tokenizer

    def encode(self, pieces: Pieces) -> list[int]:
        text = "".join(self._secret[piece] if isinstance(piece, int) else piece for piece in pieces)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def token_bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        return self._bytes_of(self._pieces.get(token, ""))


def _merge_added(data: dict[str, Any], settings: FolderSettings, path: Path) -> dict[int, dict[str, Any]]:
    """The added tokens of tokenizer.json, with those that only the files beside it declare."""
    added = {entry["id"]: entry for entry in data.get("added_tokens") or []}
    for token, entry in settings.added.items():
        mine = added.setdefault(token, dict(entry))
        if mine["content"] != entry["content"]:
            raise EightfoldError(
                f"{path} calls token {token} {mine['content']!r}, the files beside it {entry['content']!r}"
            )
        mine["special"] = mine["special"] or entry["special"]
    known = {entry["content"] for entry in added.values()}
    table = _table(data["model"]["vocab"])
    for text in settings.special - known:
        if text in table:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            added[table[text]] = {"id": table[text], "content": text, "special": True, **flags}
    return added


def _table(vocab: Any) -> dict[str, int]:
    """A model's pieces and their ids; a unigram model lists [piece, score] in the order of the ids."""
    return dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}


def _rename(data: dict[str, Any], names: Mapping[str, str]) -> None:
    """Take the controls' spellings out of the model too, where merges might otherwise build them from letters."""
    model = data["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): token for text, token in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if model.get("merges"):
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if names.keys().isdisjoint((*pair, "".join(pair)))]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])


def _decoder(decoder: Any, path: Path) -> tuple[Callable[[str], bytes], bool]:
    """How a piece becomes bytes, and whether a decoded text loses one space in front."""
    steps = decoder["decoders"] if decoder and decoder["type"] == "Sequence" else [decoder or {"type": None}]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level(), False
    space, strips = "", False
    for step in steps:
        if step["type"] == "Replace" and step["content"] == " " and step["pattern"].keys() == {"String"}:
            space = step["pattern"]["String"]
        elif step["type"] == "Metaspace":
            space = step["replacement"]
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            strips = scheme != "never"
        elif step["type"] == "Strip" and step["content"] == " " and step["stop"] == 0:
            strips = step["start"] > 0
        elif step["type"] not in ("ByteFallback", "Fuse"):
            space = ""
            break
    if not space:
        raise EightfoldError(f"{path}: its decoder ({kinds}) is not implemented; ByteLevel and sentencepiece's are")
    has_bytes = "ByteFallback" in kinds
    return lambda piece: _piece_bytes(piece, space, has_bytes), strips


def _piece_bytes(piece: str, space: str, has_bytes: bool) -> bytes:
    if has_bytes and re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(space, " ").encode()


def _byte_level() -> Callable[[str], bytes]:
    """Decoder of byte-level BPE, where printable Latin-1 stands for itself and the other bytes for 256, 257, …"""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    table = {chr(byte): bytes([byte]) for byte in shown}
    table |= {chr(256 + i): bytes([byte]) for i, byte in enumerate(hidden)}
    return lambda piece: b"".join(table.get(char, char.encode()) for char in piece)


class SentencePieceVocabulary:
    """A tokenizer.model, run by the `sentencepiece` library, which treats every text as ordinary by itself.

    A space goes in front of each piece of text, as the model file asks, and as Mistral's own code and Hugging
    Face's do; with `"legacy": false` in tokenizer_config.json, in front of the first piece alone.
    """

    def __init__(self, path: Path, settings: FolderSettings) -> None:
        """Raises EightfoldError on a file that sentencepiece refuses."""
        from sentencepiece import SentencePieceProcessor  # heavy: only when a tokenizer is really loaded

        try:
            model = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise EightfoldError(f"{path} is refused by the sentencepiece library: {error}") from None
        self._model: Any = model
        self._later_prefix = settings.config.get("legacy", True) is not False
        count = model.get_piece_size()
        self.controls = {model.id_to_piece(i): i for i in range(count) if model.is_control(i) or model.is_unknown(i)}
        for text in settings.special:
            if not model.is_unknown(model.piece_to_id(text)):
                self.controls[text] = model.piece_to_id(text)
        ordinary: dict[str, int] = {}
        for token, entry in settings.added.items():
            kind = self.controls if settings.is_control(entry["content"], entry["special"]) else ordinary
            kind[entry["content"]] = token
        self._ordinary = Spellings({text: token for text, token in ordinary.items() if token >= count})
        self._added = {**{token: text for text, token in self.controls.items()}, **self._ordinary.text_of}
        # The unknown token may come of text: that is what it is for.
        self._forbidden = frozenset(self.controls.values()) - {model.unk_id()}
        self.bos, self.eos = (model.id_to_piece(i) if i >= 0 else None for i in (model.bos_id(), model.eos_id()))
        self._newline = len(model.encode("\n"))
        self.size = max([count - 1, *self._added]) + 1
        self.strips_space = model.id_to_piece(model.encode("x"))[0].startswith(_SPACE)

    def encode(self, pieces: Pieces) -> list[int]:
        ids: list[int] = []
        for number, piece in enumerate(pieces):
            if isinstance(piece, int):
                ids.append(piece)
                continue
            for part in self._ordinary.split(piece):
                ids += [part] if isinstance(part, int) else self._encode_text(part, number == 0 or self._later_prefix)
        return ids

    def _encode_text(self, text: str, prefix: bool) -> list[int]:
        # Without the prefix: encode behind a line break, which never joins with what follows, and drop that.
        ids = self._model.encode(text) if prefix else self._model.encode("\n" + text)[self._newline :]
        if self._forbidden.isdisjoint(ids):
            return list(ids)
        return [i for token in ids for i in (self._letters(token) if token in self._forbidden else [token])]

    def _letters(self, control: int) -> list[int]:
        """A control that the model file finds in text (a "user-defined symbol"), letter by letter."""
        return [self._model.piece_to_id(letter) for letter in self._model.id_to_piece(control)]

    def token_bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        if not 0 <= token < self._model.get_piece_size():
            return b""
        piece: str = self._model.id_to_piece(token)
        return _piece_bytes(piece, _SPACE, self._model.is_byte(token))
