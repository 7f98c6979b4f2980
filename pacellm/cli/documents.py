"""Files that are put in front of a question."""

from __future__ import annotations

from pathlib import Path

from pacellm.errors import PaceError


def read_document(path: Path) -> str:
    """A file's text, which is UTF-8.

    Raises:
        PaceError: it cannot be read, or is no text.
    """
    try:
        content = path.expanduser().read_bytes()
    except OSError as error:
        raise PaceError(f"cannot read {path}: {error.strerror or error}") from error
    if content.startswith(b"%PDF-"):
        raise PaceError(f"{path} is a PDF; give its text, as `pdftotext` writes it")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PaceError(f"cannot read {path}: it is not UTF-8 text ({error})") from error
