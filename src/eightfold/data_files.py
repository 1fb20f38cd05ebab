"""Text files that people bring: data sets and prompts. No torch here."""

from __future__ import annotations

from pathlib import Path

from eightfold.types import EightfoldError


def read_text(path: Path) -> str:
    """All of a UTF-8 file, without a byte order mark. Raises EightfoldError, with the line, if that can't be read."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise EightfoldError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise EightfoldError(f"{path}:{line} is not text in UTF-8 (byte {error.object[error.start]:#04x})") from None
