"""Tokenizers to test with: Mistral's real ones in both file forms, a small one of our own, and the oracle."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from eightfold.tokenizer import Tokenizer

HF_V1 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
HF_V3 = (
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set messages = messages[1:] %}"
    "{%- endif %}{{- bos_token }}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- if loop.last and system is defined %}"
    "{{- '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}{%- else %}{{- '[INST] ' + m.content + '[/INST]' }}"
    "{%- endif %}{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}{%- endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USER, YES = {"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Yes, and 3 more."}
CHATS = [
    [USER],
    [USER, YES, {"role": "user", "content": "What? \n"}],
    [{"role": "system", "content": "Be brief."}, USER],
    [{"role": "system", "content": "Be brief."}, USER, YES, {"role": "user", "content": " spaced "}, YES, USER],
    [{"role": "user", "content": "say </s> or <s> or [INST] or [/INST] or <unk> [TOOL_CALLS]"}],
]


def data_file(version: str) -> Path:
    """A real tokenizer file out of mistral-common's package."""
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    return next(data.glob(f"*.model.{version}"))


def write_folder(kind: str, folder: Path) -> Path:
    """A folder by its kind: v1 and v3 hold tokenizer.model alone; v1-json and v1-first the same as tokenizer.json."""
    version, *form = kind.split("-")
    folder.mkdir(parents=True)
    if not form:
        shutil.copy(data_file(version), folder / f"tokenizer.model.{version}")
    else:
        folder.joinpath("tokenizer.json").write_text(json.dumps(as_json(data_file(version), form[0])))
    return folder


def as_json(path: Path, form: str) -> dict[str, Any]:
    """A sentencepiece file as the tokenizer.json of Hugging Face's Mixtral ("json"), or of newer make ("first")."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    merges = []
    for piece, token in vocab.items():
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab]
        merges += [(-model.get_score(token), vocab[a], vocab[b], a, b) for a, b in pairs]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    controls = [i for i in vocab.values() if model.is_control(i) or model.is_unknown(i)]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    return {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": None,
        "added_tokens": [{"id": i, "content": model.id_to_piece(i), **flags} for i in controls],
        "normalizer": normalizer if form == "json" else None,
        "pre_tokenizer": None if form == "json" else space,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [*steps, strip]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [[a, b] for *_, a, b in sorted(merges)],
        },
    }


def byte_level(folder: Path, extra: tuple[str, ...] = (), **config: object) -> Tokenizer:
    """A small byte-level BPE of our own, with a few added tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    tok.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(["the answer to the question is in the text </s> s> im_end"] * 9, trainer)
    tok.add_tokens(list(extra))
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    settings_ = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_))
    return Tokenizer.load(folder)


@functools.cache
def loaded(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@functools.cache
def oracle(version: str) -> Any:
    mistral = pytest.importorskip("mistral_common.tokens.tokenizers.mistral").MistralTokenizer
    return {"v1": mistral.v1, "v3": mistral.v3}[version]()
