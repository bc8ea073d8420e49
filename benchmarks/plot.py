"""Draw what `benchmarks/step.py --json` wrote as bars, one panel per net, as SVG.

    python -m benchmarks.step --json step.json
    python -m benchmarks.plot step.json docs/step.svg "time of a step over float's"

Needs matplotlib: pip install "lightning-qat[bench]".
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib import pyplot


def draw(results: dict[str, dict[str, list[float]]], label: str, file: Path) -> None:
    """Medians of every variant but float, ours in another colour than the peers."""
    count = len(results)
    figure, axes = pyplot.subplots(1, count, figsize=(4.5 * count, 5), sharey=True, squeeze=False)
    for axis, (net, found) in zip(axes[0], results.items(), strict=True):
        panel: Any = axis
        names = [name for name in found if name != "float"][::-1]
        medians = [statistics.median(found[name]) for name in names]
        ours = [name.startswith(("layers", "joins")) for name in names]
        panel.barh(names, medians, color=["tab:blue" if own else "tab:gray" for own in ours])
        for number, median in enumerate(medians):
            panel.text(median, number, f" {median:.2f}", va="center", fontsize=8)
        panel.axvline(1.0, color="black", linewidth=0.8)
        panel.set_title(net)
        panel.set_xlabel(label)
        panel.set_xlim(0, max(medians) * 1.15)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="what --json wrote")
    parser.add_argument("file", type=Path, help="the drawing to write")
    parser.add_argument("label", help="what the numbers are")
    parser.add_argument("--value", type=int, help="which of several numbers (--memory has two)")
    options = parser.parse_args()
    numbers = json.loads(options.results.read_text())
    if options.value is not None:
        numbers = {
            net: {name: [values[options.value]] for name, values in found.items()}
            for net, found in numbers.items()
        }
    draw(numbers, options.label, options.file)
