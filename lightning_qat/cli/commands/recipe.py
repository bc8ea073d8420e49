"""``lightning-qat recipe``."""

from __future__ import annotations

from typing import Literal

import click

from lightning_qat.cli.command import FINE, command, json_option, print_json
from lightning_qat.cli.console import print_table


@command("recipe")
@click.argument("source", required=False, metavar="[NAME|FILE]")
@click.option(
    "--to",
    type=click.Choice(["yaml", "json"]),
    default="yaml",
    show_default=True,
    help="What to print a recipe as.",
)
@json_option
def recipe(source: str | None, to: Literal["yaml", "json"], as_json: bool) -> int:
    """Show, check and translate recipes.

    Without an argument the presets are listed. NAME is a preset, FILE a recipe as YAML or JSON, or
    AMCT's configuration: its simple one (.cfg) or its JSON. All that is wrong in a file is told at
    once. What is printed is the whole recipe, with every key that a file leaves out.

      lightning-qat recipe w4a8
      lightning-qat recipe retrain.cfg --to yaml > recipe.yaml

    The second one brings AMCT's configuration to QATCallback("recipe.yaml").
    """
    import yaml

    from lightning_qat.recipe.recipe import PRESETS, Recipe

    as_json |= to == "json"
    if source is None:
        if as_json:
            print_json({name: r.to_dict() for name, r in PRESETS.items()})
        else:
            print_table(("preset", "weights", "activations", "else"), [*map(_row, PRESETS)])
        return FINE
    values = Recipe.load(source).to_dict()
    if as_json:
        print_json(values)
    else:
        print(yaml.safe_dump(values, sort_keys=False).rstrip())
    return FINE


def _row(name: str) -> tuple[str, str, str, str]:
    from lightning_qat.recipe.recipe import PRESETS

    shown = PRESETS[name]
    weight, activation = shown.weight, shown.activation
    more = [] if shown.first_last is None else [f"first and last layer {shown.first_last} bits"]
    more += [] if shown.join_bits is None else [f"sums and norms {shown.join_bits} bits"]
    more += [] if shown.joins else ["inputs of layers only"]
    kind = "symmetric" if activation.symmetric else "affine"
    return (
        name,
        f"{weight.bits} bits, {weight.granularity}, {weight.quantizer}",
        f"{activation.bits} bits, {kind}, {activation.quantizer}, {activation.calibration}",
        "; ".join(more),
    )
