"""Text files read with one clear error, and written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from eightfold.data_files import numbered_lines, read_jsonl, read_text, write_text
from eightfold.types import EightfoldError


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "one\r\ntwo\n")
    assert target.read_bytes() == b"one\r\ntwo\n" and list(tmp_path.iterdir()) == [target]
    (tmp_path / "folder").mkdir()
    with pytest.raises(EightfoldError, match=r"cannot write .*folder: Is a directory"):
        write_text(tmp_path / "folder", "text")
    with pytest.raises(UnicodeEncodeError):
        write_text(target, "three\ud800")
    assert target.read_bytes() == b"one\r\ntwo\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "folder"]


def test_lines_are_numbered_as_editors_do(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "x\xe2\x80\xa8y"}\r\n\n{"a": "z"}\n')
    assert list(numbered_lines(read_text(path))) == [(1, '{"a": "x\u2028y"}'), (3, '{"a": "z"}')]
    assert list(read_jsonl(path, {"a": str})) == [(1, {"a": "x\u2028y"}), (3, {"a": "z"})]


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(EightfoldError, match=r"a\.jsonl holds no item"):
        list(read_jsonl(tmp_path / "a.jsonl", {}))
