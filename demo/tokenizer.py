"""Trains the byte-level BPE tokenizer of the demo model and writes its Hugging Face files."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import world

SPECIAL = ("<unk>", "<s>", "</s>")

CHAT_TEMPLATE = (
    "{%- if messages and messages[0]['role'] == 'system' %}"
    "{%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set system = '' %}{%- set turns = messages %}{%- endif %}"
    "{{- bos_token }}"
    "{%- for message in turns %}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) or message['role'] not in ['user', 'assistant'] %}"
    "{{- raise_exception('After the optional system message, conversation roles must alternate"
    " user/assistant/user/assistant/...') }}"
    "{%- endif %}"
    "{%- if message['role'] == 'user' %}"
    "{%- if loop.first and system %}{{- '[INST] ' + system + '\\n\\n' + message['content'] + ' [/INST]' }}"
    "{%- else %}{{- '[INST] ' + message['content'] + ' [/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}"
    "{%- endfor %}"
)


def corpus(seed: int) -> list[str]:
    """Training text for the merges: the world, and ordinary English so that it stays affordable."""
    rng = random.Random(seed)
    documents = [world.reading_document(rng, rng.randint(2, 10), 2, 6, 0.2) for _ in range(4000)]
    texts = ["".join(piece.text for piece in document) for document in documents]
    for fact in world.FACTS:
        texts += [f"{question} {fact.answer}" for question in fact.questions] * 6
    # Every name must become one token in both cases: a question is lower case, a passage is not.
    for kind in world.KINDS:
        texts += [f" {w.lower()} {w}" for w in kind.subjects + kind.things] * 60
    english = (Path(__file__).parent / "english.txt").read_text()
    texts += [english, *(" " + line for line in english.splitlines())] * 12
    texts += [english.title()] * 2
    return [text.replace("</s>", "") for text in texts]


def train(vocab: int, seed: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab` entries; encoding puts one <s> in front."""
    tok = Tokenizer(models.BPE(unk_token=None))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(corpus(seed), trainer)
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    assert tok.get_vocab_size() == vocab and [tok.token_to_id(name) for name in SPECIAL] == [0, 1, 2]
    return tok


def save(tok: Tokenizer, folder: Path, max_positions: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")


def case_twins(tok: Tokenizer) -> list[int]:
    """For each token the id of its lower-case form where that is one token, else its own id."""
    vocab = tok.get_vocab()
    # The leading space is the letter U+0120 here, which must not be lowered too.
    lower = {name: "".join(c.lower() if c.isascii() else c for c in name) for name in vocab}
    return [vocab.get(lower[name], i) for name, i in sorted(vocab.items(), key=lambda item: item[1])]


def words_cost(tok: Tokenizer, text: str) -> float:
    """Tokens per white-space separated word of the text."""
    return len(tok.encode(text, add_special_tokens=False).ids) / max(1, len(text.split()))
