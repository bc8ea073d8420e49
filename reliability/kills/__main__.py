"""``python -m reliability.kills``: kill training runs and exports, and look at what they leave."""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 1 if something was lost, half written or untrue."""
    parser = argparse.ArgumentParser(prog="python -m reliability.kills", description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="processes to kill  [200]")
    parser.add_argument("--seed", type=int, default=0, help="of signals and moments  [0]")
    parser.add_argument("--folder", type=Path, help="for the runs; those with problems stay")
    options = parser.parse_args(arguments)
    # A fork takes no threads along.
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    from reliability.kills.chains import run_chains

    base = options.folder or Path(tempfile.mkdtemp(prefix="qat_kills_"))
    began = time.monotonic()
    found = run_chains(
        options.count, base, random.Random(options.seed), lambda line: print(line, flush=True)
    )
    kinds = ", ".join(f"{number} {name}" for name, number in sorted(found.kills.items()))
    print(
        f"\n{found.count} processes killed ({kinds}), {found.exporting} of them while they "
        f"exported; {found.unhit} ended before; {found.left} left an unfinished file\n"
        f"{found.equal} of {found.chains} finished runs equal the uninterrupted one to the bit\n"
        f"{len(found.problems)} problems in {time.monotonic() - began:.0f} s"
    )
    for problem in found.problems:
        print(f"  {problem}", file=sys.stderr)
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
