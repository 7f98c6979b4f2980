"""Draws recall over length: ``python load_tests/working_memory_picture.py TITLE:LENGTH=RECORDS … -o OUT.png``.

RECORDS are what load_tests/working_memory.py has written; a panel for each TITLE, a line for each arm, with 95 %
intervals over documents. The last line is JSON: by title, length and arm the share that is right and its interval.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from load_tests.bank_experiment import bootstrap

NAMES = {"recent": "nothing called back", "random": "as much by lot", "forced": "the right block", "full": "all keys"}


def recall(file: Path) -> dict[str, tuple[float, float, float]]:
    """By arm: share that is right, and the interval's ends."""
    by_arm: dict[str, dict[int, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for line in file.read_text().splitlines():
        one = json.loads(line)
        by_arm[one["arm"]][one["document"]].append(one["right"])
    found = {}
    for arm, documents in by_arm.items():
        shares = [sum(right) / len(right) for right in documents.values()]
        found[arm] = (sum(shares) / len(shares), *bootstrap(shares))
    return found


def draw(panels: dict[str, dict[int, dict[str, tuple[float, float, float]]]], out: Path) -> None:
    """A panel for each title."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 3.6), squeeze=False, layout="constrained"
    )
    for axis, (title, lengths) in zip(axes[0], panels.items(), strict=True):
        for arm in sorted({arm for found in lengths.values() for arm in found}, key=lambda arm: (arm in NAMES, arm)):
            points = [(length, *found[arm]) for length, found in sorted(lengths.items()) if arm in found]
            x, y, low, high = zip(*points, strict=True)
            errors = [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
            label = NAMES.get(arm, f"called back by {arm.replace('+', ' and ')}")
            axis.errorbar(x, y, yerr=errors, marker="o", capsize=3, label=label)
        axis.set(title=title, xscale="log", ylim=(-0.04, 1.04), xlabel="tokens of the history", ylabel="right answers")
        axis.set_xticks(sorted(lengths), [f"{length:,}" for length in sorted(lengths)])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(loc="center right", fontsize=8)
    figure.savefig(out, dpi=140)


def main() -> None:
    """Draw what is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", metavar="TITLE:LENGTH=RECORDS")
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    panels: dict[str, dict[int, dict[str, tuple[float, float, float]]]] = defaultdict(dict)
    for one in options.records:
        place, _, file = one.partition("=")
        title, _, length = place.rpartition(":")
        panels[title][int(length)] = recall(Path(file))
    draw(panels, options.out)
    print(json.dumps(panels))


if __name__ == "__main__":
    main()
