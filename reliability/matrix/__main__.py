"""Try the rows of one table of versions, and print what passed.

    make matrix
    python -m reliability.matrix [--rows NAME ...] [--list | --github] [--again] [--cuda]

Every row gets an environment below .matrix/ (torch is installed once per version), in which a few
minutes of tests run: the smallest that touch what other packages may change. A row that was tried
with the same code, tests and pins is not tried again. Exits with 1 if a test failed. Needs an
interpreter of each version on the path, or of pyenv; rows without one are left out, as are rows
whose torch pip finds with CUDA alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from fnmatch import fnmatch

from reliability.matrix.results import Result, earlier, keep, state, table
from reliability.matrix.rows import ROWS, Row
from reliability.matrix.run import run


def main(arguments: list[str] | None = None) -> int:
    """Try rows, print the table; the exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        "python -m reliability.matrix",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="names, or patterns of them")
    parser.add_argument("--list", action="store_true", help="print the rows, with their pins")
    parser.add_argument(
        "--github", action="store_true", help="print the rows for a workflow of GitHub"
    )
    parser.add_argument("--again", action="store_true", help="also rows that were tried before")
    parser.add_argument("--cuda", action="store_true", help="also a torch with CUDA, of gigabytes")
    options = parser.parse_args(arguments)
    rows = [r for r in ROWS if any(fnmatch(r.name, name) for name in options.rows or "*")]
    if not rows:
        parser.error(f"no row is named {options.rows}; --list shows the names")
    if options.github:
        for name, whole in (("whole", True), ("parts", False)):
            print(f"{name}={json.dumps([github(row) for row in rows if row.whole is whole])}")
        return 0
    if options.list:
        for row in rows:
            print(f"{row.name}: Python {row.python}, {' '.join(row.pins) or 'constraints.txt'}")
        return 0
    known = {} if options.again else earlier()
    results = [_result(row, known, cuda=options.cuda) for row in rows]
    print(table(results))
    for result in results:
        for name in result.failed:
            print(f"{result.row}: {name}")
    return 1 if any(result.failed for result in results) else 0


def github(row: Row) -> dict[str, str]:
    """A row for a workflow."""
    pins = " ".join(row.pins)
    described = {"name": row.name, "python": row.python}
    if not row.pins and row.constrained:
        return described | {"setup": "LOCKED=1"}
    return described | {"pip_args": pins or "--upgrade"}


def _result(row: Row, known: dict[str, Result], *, cuda: bool) -> Result:
    found = known.get(row.name)
    if found is not None and found.good and found.state == state(row):
        return found
    print(f"== {row.name}", flush=True)
    try:
        result = run(row, cuda=cuda)
    except subprocess.CalledProcessError as error:
        reason = f"its environment cannot be made: {error}"
        result = Result(row.name, state(row), failed=[reason])
    keep(result)
    return result


if __name__ == "__main__":
    sys.exit(main())
