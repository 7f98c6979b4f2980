"""Files that are put in front of a question."""

from __future__ import annotations

import logging
from pathlib import Path

from pacellm.errors import PaceError

_PDF = b"%PDF-"


def read_document(path: Path) -> str:
    """A file's text: UTF-8, or what a PDF has on its pages.

    Raises:
        PaceError: it cannot be read, or is something else.
    """
    try:
        content = path.expanduser().read_bytes()
    except OSError as error:
        raise PaceError(f"cannot read {path}: {error.strerror or error}") from error
    if content.startswith(_PDF):
        return _pdf_text(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PaceError(f"cannot read {path}: it is neither UTF-8 text nor a PDF ({error})") from error


def _pdf_text(path: Path) -> str:
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ModuleNotFoundError:
        raise PaceError(f"{path} is a PDF; reading it needs pip install 'pacellm[pdf]'") from None
    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it reads what it can of a file that breaks the rules
    try:
        pages = [page.extract_text().strip() for page in PdfReader(path.expanduser()).pages]
    except (PyPdfError, OSError, ValueError, KeyError) as error:
        raise PaceError(f"cannot read {path}: the PDF is damaged or locked ({error})") from error
    text = "\n\n".join(filter(None, pages))
    if not text:
        raise PaceError(f"{path} is a PDF without text: its pages are pictures")
    return text
