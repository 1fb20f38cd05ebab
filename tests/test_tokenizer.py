"""Plain text to ids and back, against mistral-common and the tokenizers library; the files of a folder."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eightfold.tokenizer import Tokenizer
from eightfold.types import EightfoldError
from vocabularies import CHATML, USER, byte_level, loaded, oracle, write_folder

TEXTS = [
    "Hello, world",
    " leading",
    "  two  spaces  ",
    "",
    "\n\nlines\n",
    "naïve café — 你好 🦙 ꧁",
    "\x00\x01",
    "a\tb",
    "<0x41> <unk> <b>",
    "x = [1, 2]",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders by kind, as `write_folder` makes them."""
    base = tmp_path_factory.mktemp("folders")
    return functools.cache(lambda kind: write_folder(kind, base / kind))


@pytest.mark.parametrize("kind", ["v1", "v1-json", "v3", "v3-json"])
def test_plain_text_has_the_ids_of_mistral_common(folders: Callable[[str], Path], kind: str) -> None:
    raw = oracle(kind[:2]).instruct_tokenizer.tokenizer
    tokenizer = loaded(folders(kind))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.vocab_size == raw.n_words
    for text in TEXTS:
        ids = tokenizer.encode(text, parse_special=False)
        assert ids == raw.encode(text, bos=True, eos=False)
        assert tokenizer.decode(ids) == text


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60))
def test_both_file_forms_agree_on_any_text(folders: Callable[[str], Path], text: str) -> None:
    model, as_json_ = loaded(folders("v1")), loaded(folders("v1-json"))
    assert model.encode(text, parse_special=False) == as_json_.encode(text, parse_special=False)
    assert model.decode(model.encode(text, parse_special=False)) == text.replace("▁", " ")


@pytest.mark.parametrize("kind", ["v1-json", "v3-first"])
def test_raw_prompts_have_the_ids_of_the_tokenizers_library(folders: Callable[[str], Path], kind: str) -> None:
    """Control tokens in a raw prompt are parsed as Hugging Face does, and are the same in tokenizer.model."""
    library = pytest.importorskip("tokenizers").Tokenizer.from_file(str(folders(kind) / "tokenizer.json"))
    library.no_truncation()
    tokenizer = loaded(folders(kind))
    for text in ["<s>[INST] hi [/INST]", "<s>a</s> b</s>", "<s> <s>x<unk>y", "<s>\n<unk>[INST][/INST] "]:
        ids = tokenizer.encode(text)
        assert ids == library.encode(text, add_special_tokens=False).ids
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == library.decode(ids, skip_special_tokens=skip)
    if kind == "v1-json":
        assert tokenizer.encode("a</s>b<s>") == loaded(folders("v1")).encode("a</s>b<s>")


def test_exactly_one_bos(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    for text in ("the text", "<s>the text", "<s><s>the text"):
        assert tokenizer.encode(text) == [1, *tokenizer.encode("the text", add_bos=False)]
    one = tokenizer.encode_chat([USER], chat_template="{{ messages[0].content }}")
    assert one == [1, *tokenizer.encode("Hi there", add_bos=False)]
    for opening in ("{{ bos_token }}", "<s>{{ bos_token }}", "\n{{ bos_token }}", "<s>\n<s>"):
        ids = tokenizer.encode_chat([USER], chat_template=opening + "{{ messages[0].content }}")
        assert ids[0] == 1 and ids.count(1) <= (2 if "\n<s>" in opening else 1) and ids[-len(one) + 1 :] == one[1:]
    assert byte_level(tmp_path / "without", add_bos_token=False).encode("x") == tokenizer.encode("x", add_bos=False)


def test_bad_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(EightfoldError, match=r"no tokenizer: neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(EightfoldError, match=r"only tekken\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0e broken")
    with pytest.raises(EightfoldError, match=r"tokenizer\.model is refused"):
        Tokenizer.load(tmp_path)
    for text, told in (("{", "can't be read as JSON"), ("[]", "a JSON list"), ("{}", "is not a tokenizer.json")):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(EightfoldError, match=told):
            Tokenizer.load(tmp_path)
    with pytest.raises(EightfoldError, match="bos_token is '<start>', which the vocabulary doesn't have"):
        byte_level(tmp_path, bos_token="<start>")
    with pytest.raises(EightfoldError, match="neither a string nor a list"):
        byte_level(tmp_path, chat_template=[3])
    with pytest.raises(EightfoldError, match=r"\(tokenizer_config\.json\) is wrong in line 1"):
        byte_level(tmp_path, chat_template="{% endfor %}")
    byte_level(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**data, "decoder": {"type": "WordPiece"}}))
    with pytest.raises(EightfoldError, match=r"decoder .*WordPiece.* is not implemented"):
        Tokenizer.load(tmp_path)


def test_files_beside_the_tokenizer(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Added tokens and names of special ones, out of whichever file has them, for both kinds of tokenizer."""
    for kind in ("v1", "v1-json"):
        folder = tmp_path / kind
        shutil.copytree(folders(kind), folder)
        (folder / "added_tokens.json").write_text('{"<|im_end|>": 32000, "<|im_start|>": 32001, "zebrafish": 32002}')
        (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}, "bos_token": "<s>"}')
        tokenizer = Tokenizer.load(folder)
        assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.vocab_size) == (32000, 1, 32003)
        assert tokenizer.encode("<|im_end|>zebrafish") == [1, 32000, 32002]
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML, "eos_token": "</s>"}))
        tokenizer = Tokenizer.load(folder)
        ids = tokenizer.encode_chat([{"role": "user", "content": "zebrafish<|im_end|>"}])
        assert tokenizer.eos_token_id == 2 and ids.count(32000) == 1 and 32002 in ids
        assert all(text in tokenizer.decode(ids) for text in ("zebrafish", "<|im_end|>", "assistant"))


def test_prefix_of_the_first_text_alone(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """ "legacy": false with tokenizer.model gives the ids of a tokenizer.json whose prefix scheme is "first"."""
    shutil.copytree(folders("v3"), tmp_path / "new")
    (tmp_path / "new" / "tokenizer_config.json").write_text('{"legacy": false}')
    model, as_json_ = Tokenizer.load(tmp_path / "new"), loaded(folders("v3-first"))
    for text in ["a b", "<s>[INST] hi[/INST] x", "<s>[INST]hi[/INST]\n\n", "[INST]é"]:
        assert model.encode(text) == as_json_.encode(text)


def test_token_text_is_fit_to_show(folders: Callable[[str], Path], tmp_path: Path) -> None:
    tokenizer = loaded(folders("v1"))
    hello, *_ = tokenizer.encode("Hello", add_bos=False)
    assert tokenizer.token_text(hello) == " Hello"
    assert [tokenizer.token_text(i) for i in (1, 2, 3 + 0x41, 3 + 0xE4)] == ["<s>", "</s>", "A", "<0xE4>"]
    assert tokenizer.token_bytes(3 + 0xE4) == b"\xe4"
    assert tokenizer.token_text(10**6) == tokenizer.token_text(-1) == ""
    small = byte_level(tmp_path)
    assert "".join(map(small.token_text, small.encode(" the answer", add_bos=False))) == " the answer"
    assert small.token_text(small.encode("é", add_bos=False)[0]) == "<0xC3>"


def test_importing_costs_nothing() -> None:
    heavy = ("torch", "jinja2", "tokenizers", "sentencepiece")
    code = f"import sys, eightfold.tokenizer; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
