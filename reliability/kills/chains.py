"""Chains of runs in one folder: killed, looked at, resumed and killed again; the last one ends."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from reliability.kills import look
from reliability.kills.children import Ended, in_child, value_of
from reliability.kills.victim import import_all, train

SIGNALS = (*[signal.SIGKILL] * 8, signal.SIGTERM, signal.SIGINT)
"""What is sent, as often as it stands here."""

KILLS_PER_CHAIN = 4


@dataclass
class Found:
    """The counts of all chains.

    Args:
        kills: By the signal's name.
        exporting: How many of them hit the exports.
        unhit: Runs that ended before their turn.
        left: Kills that left an unfinished file behind.
        chains: Chains that were finished.
        equal: Chains whose result is that of the uninterrupted run, to the bit.
        problems: Everything that is wrong.
    """

    kills: Counter[str] = field(default_factory=Counter)
    exporting: int = 0
    unhit: int = 0
    left: int = 0
    chains: int = 0
    equal: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Processes that were killed."""
        return sum(self.kills.values())


def run_chains(count: int, base: Path, chance: random.Random, say: Callable[[str], None]) -> Found:
    """Kill processes until there are ``count``.

    Args:
        count: How many.
        base: A folder for the runs; those with problems stay in it.
        chance: Chooses signals and moments.
        say: Called with a line after each chain.
    """
    import_all()
    whole = base / "uninterrupted"
    ended = _train(whole, None)
    if ended.code != 0 or ended.told is None:
        raise RuntimeError((whole / "log").read_text()[-2000:])
    expected = value_of(partial(look.result, whole), base / "log")
    times = ended.told, ended.seconds - ended.told
    found = Found()
    while found.count < count:
        folder = base / f"chain{found.chains}"
        problems = _chain(folder, min(KILLS_PER_CHAIN, count - found.count), times, chance, found)
        got = {} if problems else value_of(partial(look.result, folder), base / "log")
        differing = [name for name in expected if got.get(name) != expected[name]]
        if got and differing:
            problems.append(f"not as the uninterrupted run: {', '.join(differing)}")
        found.chains += 1
        found.equal += not differing
        found.problems += [f"{folder}: {problem}" for problem in problems]
        if not problems:
            shutil.rmtree(folder)
        say(
            f"{found.count} kills ({found.exporting} while exporting), {found.left} left a file, "
            f"{found.equal} of {found.chains} runs as the uninterrupted one, "
            f"{len(found.problems)} problems"
        )
    return found


def _chain(
    folder: Path,
    kills: int,
    times: tuple[float, float],
    chance: random.Random,
    found: Found,
) -> list[str]:
    """Kill so often, then let a run end; what is wrong meanwhile or at the end."""
    problems: list[str] = []
    done = 0
    while done < kills:
        number = chance.choice(SIGNALS)
        exporting = chance.random() < 0.5
        ended = _train(folder, (number, chance.uniform(0, times[exporting]), exporting))
        hit = ended.signal == number or ended.code != 0
        if not hit:
            # The run has ended; the next one exports again.
            found.unhit += 1
            if found.unhit > 10 * (found.count + kills):
                return [*problems, "runs end before they are killed"]
        else:
            done += 1
            found.kills[signal.Signals(number).name] += 1
            found.exporting += ended.told is not None
            found.left += bool(look.leftovers(folder))
        if ended.code not in (-1, 0, 1):
            problems.append(f"exit code {ended.code}")
        problems += value_of(partial(look.problems, folder), folder / "log")
    ended = _train(folder, None)
    if ended.code != 0:
        return [*problems, f"the run that should end: {(folder / 'log').read_text()[-1000:]}"]
    problems += value_of(partial(look.problems, folder), folder / "log")
    problems += [f"left over: {name}" for name in look.leftovers(folder)]
    return problems


def _train(folder: Path, kill: tuple[int, float, bool] | None) -> Ended:
    temporary = folder / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)

    def work(tell: Callable[[], None]) -> None:
        os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
        train(folder, tell)

    return in_child(work, folder / "log", kill)
