"""Long runs, by part.

    python -m reliability.soak [training exports starts] [--steps 10000] [--rounds 500]

``training``: fits through all phases, with validation and checkpoints, in one process and in two;
memory from step 1,000 on grows by less than 1 %, and the time of a step has no trend. ``exports``:
converts and exports again and again; what every round leaves behind, beside what torch.export
leaves. ``starts``: processes that start at once with an empty cache of compiled loops compile once.
Exits with 1 where something of that does not hold.
"""

from __future__ import annotations

import argparse
import sys

from reliability.soak.exports import report_exports
from reliability.soak.report_training import report_training
from reliability.soak.starts import report_starts

PARTS = ("training", "exports", "starts")


def main(arguments: list[str] | None = None) -> int:
    """Run the parts, print their tables; the exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        "python -m reliability.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--steps", type=int, default=10_000, help="steps of a fit")
    parser.add_argument("--rounds", type=int, default=500, help="rounds of each export")
    parser.add_argument("--minutes", type=float, default=15, help="at most, for a kind of export")
    chosen = parser.parse_args(arguments)
    unknown = sorted(set(chosen.parts) - set(PARTS))
    if unknown:
        parser.error(f"PART must be of {', '.join(PARTS)}; got {', '.join(unknown)}")
    parts = chosen.parts or PARTS
    right = True
    if "training" in parts:
        right &= report_training(chosen.steps)
    if "exports" in parts:
        right &= report_exports(chosen.rounds, chosen.minutes)
    if "starts" in parts:
        right &= report_starts()
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
