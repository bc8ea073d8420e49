"""``lightning-qat sensitivity``."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lightning_qat.cli.command import (
    FILE,
    FINE,
    FOUND,
    command,
    json_option,
    print_json,
    project_options,
    trust_option,
)
from lightning_qat.cli.console import say
from lightning_qat.cli.module_class import LightningConfig
from lightning_qat.cli.trained_module import (
    module_class,
    recipe_of,
    require_checkpoint,
    trained_module,
)
from lightning_qat.cli.validation_data import data_module, first_calls

if TYPE_CHECKING:
    from lightning_qat.insight.sensitivity.result import Sensitivity
    from lightning_qat.insight.sensitivity.suggest import Suggestion
    from lightning_qat.recipe.recipe import Recipe

_IN_OPTIONS = {
    "choices=(8, None)": "--bits 8,float",
    "as resume=": "as --resume",
    "Pass recipe=, or the float model": "Leave out --recipe, or name the float checkpoint",
    "evaluate must leave": "Validation must leave",
    "evaluate gives": "validation gives",
}
"""What the function of this name says, in the words of the command."""


def _bits(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int | None, ...]:
    """Numbers of bits with commas between them; ``float`` among them is ``None``."""
    words = [] if value is None else [word.strip() for word in value.split(",")]
    if not {*words} <= {*"2345678", "float"}:
        raise click.BadParameter(
            f"must be numbers from 2 to 8, or float, such as 8,4,2; got {value!r}."
        )
    return tuple(None if word == "float" else int(word) for word in words)


@command("sensitivity")
@click.argument("checkpoint", type=FILE, metavar="CKPT")
@project_options
@click.option(
    "--recipe",
    metavar="NAME|FILE",
    help="How layers are quantized.  [default: int8, or what a QAT checkpoint was trained with]",
)
@click.option(
    "--metric",
    metavar="NAME",
    help="What the module logs in validation; higher is better.  [default: SQNR of its outputs on "
    "the first batches, in decibels]",
)
@click.option("--minimize", is_flag=True, help="Lower is better, as of a loss; shown negated.")
@click.option(
    "--mode",
    type=click.Choice(["only", "all-but"]),
    default="only",
    show_default=True,
    help="Quantize one layer at a time, or all but one.",
)
@click.option(
    "--bits",
    callback=_bits,
    metavar="8,4,2",
    help="Bits of weights to measure; 'float' among them lets --budget leave layers in float.  "
    "[default: the recipe's]",
)
@click.option(
    "--budget",
    type=float,
    help="Find a recipe at most so far from the float model; without --metric: of at least so "
    "many decibels.",
)
@click.option("--write", type=FILE, metavar="FILE.yaml", help="Where that recipe goes.")
@click.option(
    "--resume", type=FILE, metavar="FILE.json", help="Keep each measurement, and go on from there."
)
@click.option("--save", type=FILE, metavar="FILE.json", help="Write the measurements.")
@click.option("--plot", type=FILE, metavar="FILE.svg", help="Draw them.")
@click.option(
    "--limit-batches",
    type=click.IntRange(min=1),
    metavar="N",
    help="Validate on the first N batches.  [default: all]",
)
@trust_option
@json_option
def sensitivity(
    checkpoint: Path,
    config: Path | None,
    module: str | None,
    datamodule: str | None,
    init_args: str | None,
    recipe: str | None,
    metric: str | None,
    minimize: bool,
    mode: str,
    bits: tuple[int | None, ...],
    budget: float | None,
    write: Path | None,
    resume: Path | None,
    save: Path | None,
    plot: Path | None,
    limit_batches: int | None,
    trust: bool,
    as_json: bool,
) -> int:
    r"""Say what quantizing each layer costs, and find a recipe that keeps a budget.

    CKPT is a float checkpoint, or one of a run with QATCallback. Lightning validates the module
    once per layer. A float module is calibrated on the first 16 batches.

      lightning-qat sensitivity float.ckpt --config config.yaml --recipe w4a4 --metric val_acc

    lists the layers, the most expensive first.

      lightning-qat sensitivity float.ckpt --config config.yaml --recipe w4a4 --metric val_acc \
          --budget 0.01 --write recipe.yaml

    writes a recipe with as few layers raised to 8 bits as keep the metric within 0.01 of the float
    module's, for QATCallback("recipe.yaml"). The exit code is 1 if nothing keeps the budget.
    """
    _check(metric, minimize, budget, write, (resume, save), plot)
    require_checkpoint(checkpoint)
    said = None if config is None else LightningConfig(config)
    cls = module_class(checkpoint, module, said)
    with _in_words_of_the_command():
        from lightning_qat.checkpoint.load import load_float_or_qat_checkpoint as load

        trained = trained_module(
            cls, checkpoint, load, init_args=init_args, config=said, trust=trust
        )
        chosen = _recipe(recipe, trained, checkpoint, trust=trust)
        result = _measured(
            trained,
            data_module(datamodule, said),
            _Metric(metric, minimize, limit_batches),
            recipe=chosen,
            mode="all_but" if mode == "all-but" else "only",
            bits=tuple(b for b in bits if b is not None),
            resume=resume,
        )
        found, problem = None, None
        if budget is not None:
            found, problem = _suggested(result, budget, bits)
    # First: a file that cannot be written costs nothing but itself.
    _show(result, found, as_json=as_json, is_met=problem is None)
    if problem is not None:
        print(f"lightning-qat sensitivity: {problem}", file=sys.stderr)
    if save is not None:
        result.save(save)
    if write is not None and found is not None and problem is None:
        write.write_text(_yaml(found.recipe), encoding="utf-8")
    if plot is not None:
        result.plot(plot)
    return FINE if problem is None else FOUND


def _check(
    metric: str | None,
    minimize: bool,
    budget: float | None,
    write: Path | None,
    kept: tuple[Path | None, ...],
    plot: Path | None,
) -> None:
    """Refuse what could only fail after everything is measured."""
    if minimize and metric is None:
        raise click.UsageError("--minimize is of a metric: add --metric NAME.")
    if write is not None and budget is None:
        raise click.UsageError("--write needs the budget that the recipe shall keep: --budget.")
    if budget is not None and not math.isfinite(budget):
        raise click.UsageError(f"--budget must be a finite number; got {budget}.")
    if plot is not None and find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install 'lightning-qat[report]'.")
    for path in (write, *kept, plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise FileNotFoundError(
                f"{str(path)!r} cannot be written: there is no folder {str(path.parent)!r}."
            )


def _recipe(given: str | None, module: Any, checkpoint: Path, *, trust: bool) -> Recipe:
    from lightning_qat.quantizers.base import Quantizer
    from lightning_qat.recipe.recipe import Recipe

    if given is not None:
        return Recipe.load(given)
    if not any(isinstance(part, Quantizer) for part in module.modules()):
        return Recipe.load("int8")
    stored = recipe_of(checkpoint, trust=trust)
    if stored is None:
        raise ValueError(
            f"{str(checkpoint)!r} holds weights only, and not the recipe that it was trained with. "
            "Name it: --recipe."
        )
    return stored


@dataclass(frozen=True)
class _Metric:
    """What is measured.

    Args:
        name: What the module logs; ``None``: the SQNR of its outputs.
        minimize: Lower is better.
        batches: Most batches of each loader; ``None``: all.
    """

    name: str | None
    minimize: bool
    batches: int | None


def _measured(module: Any, data: Any, metric: _Metric, **options: Any) -> Sensitivity:
    from lightning_qat.callback.validation.validation import Validation, logged
    from lightning_qat.insight.sensitivity.sensitivity import sensitivity as measured

    say("validating")
    validation = Validation(module, data)
    calls, found = first_calls(validation, module, metric.batches)
    name = metric.name
    options |= {"data": calls, "progress": sys.stderr.isatty()}
    if name is None:
        return measured(module, **options)
    # Before anything is measured.
    logged(found, name, module)

    def evaluate(model: Any) -> float:
        value = validation.metric(model, name, metric.batches)
        if not math.isfinite(value):
            raise ValueError(f"{name!r} must be a finite number; got {value}")
        return -value if metric.minimize else value

    shown = f"-{name}" if metric.minimize else name
    return replace(measured(module, evaluate=evaluate, **options), metric=shown)


def _suggested(
    result: Sensitivity, budget: float, bits: tuple[int | None, ...]
) -> tuple[Suggestion, str | None]:
    """A recipe; or the best one, and why it does not keep the budget."""
    from lightning_qat.insight.sensitivity.suggest import BudgetNotMet, suggest

    say("searching for a recipe")
    own = {size.bits for size in result.sizes}
    try:
        return suggest(result, budget, choices=(*own, *bits) if None in bits else ()), None
    except BudgetNotMet as error:
        return error.best, _in_options(str(error))


@contextmanager
def _in_words_of_the_command() -> Iterator[None]:
    """Keep what the module prints out of our output, and name options in messages."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (OSError, ImportError):
        raise
    except ValueError as error:
        raise ValueError(_in_options(str(error))) from error
    except Exception as error:  # the user's forward runs
        raise ValueError(f"The model cannot be run: {type(error).__name__}: {error}") from error


def _in_options(text: str) -> str:
    for said, option in _IN_OPTIONS.items():
        text = text.replace(said, option)
    return text


def _yaml(recipe: Recipe) -> str:
    import yaml

    return yaml.safe_dump(recipe.to_dict(), sort_keys=False)


def _show(result: Sensitivity, found: Suggestion | None, *, as_json: bool, is_met: bool) -> None:
    if not as_json:
        print(result)
        if found is not None:
            print(found if is_met else f"The best candidate: {found}")
        return
    values = result.to_dict()
    if found is not None:
        values["suggestion"] = {
            "budget": found.budget,
            "is_met": is_met,
            # As in the other values: JSON has no infinity.
            "value": found.value if math.isfinite(found.value) else str(found.value),
            "changes": dict(found.changes),
            "is_least": found.is_least,
            "evaluations": found.evaluations,
            "size": found.size,
            "float_size": found.float_size,
            "bops": found.bops,
            "recipe": found.recipe.to_dict(),
        }
    print_json(values)
