"""What statements do in an interpreter that has done nothing before."""

import os
import subprocess
import sys
from collections.abc import Sequence

EACH = """
import os, sys
{first}
for statement in {statements}:
    print("ANSWER", flush=True)
    if child := os.fork():
        failed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert not failed, statement
    else:
        exec(statement)
        sys.stdout.flush()
        os._exit(0)
"""


def answers(first: str, statements: Sequence[str]) -> list[str]:
    """What each of some statements prints in a process of its own, in which ``first`` was run.

    Processes are forked from one that has run it, so that its imports are paid for once.
    """
    if hasattr(os, "fork"):
        return printed(EACH.format(first=first, statements=[*statements])).split("ANSWER\n")[1:]
    return [printed(f"{first}\n{statement}") for statement in statements]


def printed(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
