"""The tables of docs/models.md, from the code; ``python -m tests.model.models_page`` writes them."""

import re
from collections import defaultdict
from pathlib import Path

from pacellm.gguf.check import ARCHITECTURES, SPLITS
from pacellm.model.families import FAMILIES, FFN_LAYOUTS, REFUSED

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def families():
    """What is served: one row per layout and place of banks."""
    groups = defaultdict(list)
    for name, family in FAMILIES.items():
        layout = FFN_LAYOUTS[family.layout]
        parts = ", ".join(f"`{part}`" for part in layout.projections) + (
            " (gate and up in one)" if layout.fused else ""
        )
        if not family.routed:
            banks = "all layers"
        elif family.shared is None:
            banks = "dense layers, if it has any"
        else:
            banks = f"dense layers, and `{family.shared}` beside routed experts"
        groups[parts, banks].append(f"`{name}`")
    rows = ["| FFN | banks | model types |", "|---|---|---|"]
    return "\n".join([*rows, *(f"| {a} | {b} | {', '.join(sorted(names))} |" for (a, b), names in groups.items())])


def refused():
    """What is not."""
    groups = defaultdict(list)
    for name, why in REFUSED.items():
        groups[why].append(f"`{name}`")
    rows = ["| model types | why, and what would help |", "|---|---|"]
    return "\n".join([*rows, *(f"| {', '.join(sorted(names))} | {why} |" for why, names in groups.items())])


def gguf():
    """What is served from GGUF files, and how text may be cut there."""
    names = ", ".join(f"`{name}`" for name in sorted(ARCHITECTURES))
    cuts = ", ".join(f"`{name}`" for name in sorted(SPLITS))
    return f"Architectures: {names}.\n\nByte-level vocabularies that cut text by: {cuts}; and sentencepiece ones."


def written(text):
    """The page with its tables made anew."""
    for name, table in (("families", families()), ("refused", refused()), ("gguf", gguf())):
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(pattern, lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
