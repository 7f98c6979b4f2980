"""Runs the example of docs/sessions.md."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/sessions.md"


def run_example(url, *, append=True):
    """What the example has found.

    Args:
        url: of a server.
        append: False leaves out what it is about.
    """
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    code = code.replace("http://127.0.0.1:8000", url)
    found: dict = {}
    exec(code if append else code.replace("append=True", "append=False"), found)
    found["client"].close()
    return found["answers"], found["follow_up"]
