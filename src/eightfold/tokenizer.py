"""Text to token ids and back: plain prompts and chats. The work on the files is in `vocabulary.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eightfold.chat_template import FALLBACK, ChatTemplate, Messages
from eightfold.detokenizer import Detokenizer
from eightfold.types import EightfoldError
from eightfold.vocabulary import (
    FolderSettings,
    JsonVocabulary,
    Pieces,
    SentencePieceVocabulary,
    Spellings,
    Vocabulary,
)

__all__ = ["Detokenizer", "Tokenizer"]


class Tokenizer:
    """The tokenizer of a checkpoint folder, and its chat template. Safe to use from several threads.

    Where text comes from decides what its spelling means. A raw prompt belongs to whoever writes it whole, so
    `encode` reads `</s>` or `[INST]` in it as control tokens (unless told not to). A chat message is content: whatever
    it spells, `encode_chat` makes it ordinary tokens, and only the template's own control tokens are such. (In the
    8x7B tokenizer `[INST]` is no control token but ordinary text wherever it stands.)

    A sequence begins with one BOS token, whether the prompt, the template, both or neither spell it; with
    `"add_bos_token": false` in tokenizer_config.json, only if they do. BOS tokens further on are left as they are.
    """

    def __init__(
        self, vocabulary: Vocabulary, settings: FolderSettings, templates: Mapping[str, str], origin: str
    ) -> None:
        """For `load`. Raises EightfoldError if BOS or EOS isn't in the vocabulary, or a template doesn't parse."""
        self.vocab_size = vocabulary.size
        self.strips_space = vocabulary.strips_space
        self.special_ids = frozenset(vocabulary.controls.values())
        self.has_chat_template = bool(templates)
        self._vocabulary = vocabulary
        self._controls = Spellings(vocabulary.controls)
        self._bytes: dict[int, bytes] = {}
        self._adds_bos = settings.config.get("add_bos_token") is not False
        names = {"bos_token": vocabulary.bos, "eos_token": vocabulary.eos, **settings.named}
        self.bos_token_id = self._named(names, "bos_token")
        self.eos_token_id = self._named(names, "eos_token")
        self._variables: dict[str, Any] = {name: text for name, text in names.items() if text}
        self._templates = {name: ChatTemplate(text, origin, self._variables) for name, text in templates.items()}
        if not templates:
            self._templates["default"] = self._fallback()
        self._last_given: tuple[str, ChatTemplate] | None = None

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a folder: its tokenizer.json, or else its tokenizer.model (also .model.v1, .v3 …).

        Raises EightfoldError if there is none, or one of its files is not what it should be.
        """
        settings = FolderSettings.read(folder)
        vocabulary: Vocabulary
        if (folder / "tokenizer.json").is_file():
            vocabulary = JsonVocabulary(folder / "tokenizer.json", settings)
        elif models := sorted(path for path in folder.glob("tokenizer.model*") if path.is_file()):
            plain = [path for path in models if path.suffix == ".model"]
            vocabulary = SentencePieceVocabulary((plain or models)[-1], settings)
        elif (folder / "tekken.json").is_file():
            raise EightfoldError(
                f"{folder} has only tekken.json, the tokenizer of models newer than Mixtral, which is not supported; "
                "put the model's tokenizer.json beside it"
            )
        else:
            raise EightfoldError(
                f"{folder} has no tokenizer: neither tokenizer.json nor tokenizer.model (or .model.v1, .v3)"
            )
        templates, origin = _folder_templates(folder, settings.config)
        return cls(vocabulary, settings, templates, origin)

    def encode(self, text: str, add_bos: bool | None = None, parse_special: bool = True) -> list[int]:
        """Ids of a raw prompt.

        Control tokens that it spells are parsed, unless `parse_special` is False. `add_bos` puts BOS in front where
        the prompt doesn't begin with it; None means what the tokenizer's files say, which for Mixtral is True.
        Raises EightfoldError on text that isn't valid Unicode.
        """
        pieces = self._controls.split(text) if parse_special else [text] if text else []
        return self._encode(pieces, self._adds_bos if add_bos is None else add_bos)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of some tokens, without control tokens or with their spelling. Ids that mean nothing add nothing.

        Bytes that aren't UTF-8 become U+FFFD, one for each longest beginning of a character, as Unicode recommends.
        """
        kept = (token for token in ids if not (skip_special_tokens and token in self.special_ids))
        data = b"".join(map(self.token_bytes, kept))
        if self.strips_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text, control tokens by their spelling; empty for ids that mean nothing."""
        if token not in self._bytes:
            self._bytes[token] = self._vocabulary.token_bytes(token)
        return self._bytes[token]

    def token_text(self, token: int) -> str:
        """A token to look at: as text with its leading space, or `<0xE4><0xBD>` where it is a part of a character."""
        data = self.token_bytes(token)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in data)

    def render_chat(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        chat_template: str | Path | None = None,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """The text that the chat template makes of a conversation. Raises EightfoldError as `encode_chat` does."""
        return self._template(chat_template, tools).render(messages, add_generation_prompt, tools)

    def encode_chat(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        chat_template: str | Path | None = None,
        tools: Sequence[Any] | None = None,
    ) -> list[int]:
        """Ids of a conversation, by the folder's chat template or Mixtral's `[INST]` form if it has none.

        `chat_template` is used instead: a template, or the path of a file that holds one. Where a template doesn't know
        the system role, the system prompt becomes the beginning of the first user message, two line breaks before it.
        Raises EightfoldError on messages that aren't chat messages, on those that the template refuses (naming one), on
        a template that can't be used, and on text that isn't valid Unicode.
        """
        template = self._template(chat_template, tools)
        pieces = template.pieces(messages, add_generation_prompt, tools, self._controls)
        bos = self.bos_token_id
        if bos in pieces and all(piece == bos or str(piece).isspace() for piece in pieces[: pieces.index(bos)]):
            pieces = pieces[pieces.index(bos) :]
        return self._encode(pieces, self._adds_bos)

    def _encode(self, pieces: Pieces, add_bos: bool) -> list[int]:
        for piece in pieces:
            if isinstance(piece, str):
                _check_unicode(piece)
        while len(pieces) > 1 and pieces[0] == pieces[1] == self.bos_token_id:
            pieces = pieces[1:]
        ids = self._vocabulary.encode(pieces)
        if add_bos and self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            return [self.bos_token_id, *ids]
        return ids

    def _named(self, names: Mapping[str, str | None], name: str) -> int | None:
        text = names[name]
        if text is not None and text not in self._vocabulary.controls:
            raise EightfoldError(f"tokenizer_config.json: {name} is {text!r}, which the vocabulary doesn't have")
        return None if text is None else self._vocabulary.controls[text]

    def _template(self, given: str | Path | None, tools: Sequence[Any] | None) -> ChatTemplate:
        if given is None:
            return self._templates["tool_use" if tools and "tool_use" in self._templates else "default"]
        source, last = str(given), self._last_given
        if last is None or last[0] != source:
            origin, text = "given with the request", source
            if "{" not in source and "\n" not in source:
                origin, text = source, _read_template(Path(source))
            last = self._last_given = source, ChatTemplate(text, origin, self._variables)
        return last[1]

    def _fallback(self) -> ChatTemplate:
        """Mixtral's form, with a space where this tokenizer begins only the very first text with one."""
        first = self._vocabulary.encode(["x"])
        later = self._vocabulary.encode([*sorted(self.special_ids)[:1], "x"])
        variables = {
            **{"bos_token": "", "eos_token": ""},
            **self._variables,
            "inst_is_control": {"[INST]", "[/INST]"} <= self._vocabulary.controls.keys(),
            "space": "" if first == later[-len(first) :] else " ",
        }
        return ChatTemplate(FALLBACK, "Mixtral's own form, as the folder has none", variables)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        before = text[max(0, error.start - 20) : error.start]
        raise EightfoldError(
            f"the text is not valid Unicode: after {before!r} stands half of a surrogate pair, {text[error.start]!r}"
        ) from None


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise EightfoldError(
            f"chat_template {str(path)!r} is neither a template (it has no {{) nor a file that can be read: {error}"
        ) from None


def _folder_templates(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """The folder's chat templates by name, and the file they come from."""
    if (folder / "chat_template.jinja").is_file():
        return {"default": _read_template(folder / "chat_template.jinja")}, "chat_template.jinja"
    given = config.get("chat_template")
    if given is None:
        return {}, ""
    try:
        templates = (
            {"default": given} if isinstance(given, str) else {str(t["name"]): str(t["template"]) for t in given}
        )
    except (KeyError, TypeError):
        raise EightfoldError(
            f"{folder}: tokenizer_config.json's chat_template is neither a string nor a list of templates"
        ) from None
    if "default" not in templates and len(templates) != 1:
        raise EightfoldError(
            f"{folder}: tokenizer_config.json has the chat templates {sorted(templates)} but no 'default'"
        )
    return {"default": next(iter(templates.values())), **templates}, "tokenizer_config.json"
