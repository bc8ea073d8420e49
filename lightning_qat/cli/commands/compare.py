"""``lightning-qat compare``."""

from __future__ import annotations

from pathlib import Path

import click

from lightning_qat.cli.arrays import model_inputs
from lightning_qat.cli.command import (
    FILE,
    FINE,
    FOUND,
    command,
    inputs_option,
    json_option,
    print_json,
    trust_option,
)
from lightning_qat.cli.console import say
from lightning_qat.cli.converted import converted_model
from lightning_qat.cli.foreign_files import compared


@command("compare")
@click.argument("model", type=FILE, metavar="MODEL.pt2")
@click.argument("file", type=FILE)
@inputs_option
@trust_option
@json_option
def compare(model: Path, file: Path, inputs: Path | None, trust: bool, as_json: bool) -> int:
    """Say where an exported file departs from the converted model.

    MODEL.pt2 is the converted model that FILE was made of. Every quantized tensor is compared in
    the order of calls: what has accumulated up to it, and the error of its layer alone, which is
    given the model's own values. So one wrong layer is told apart from rounding that grows.

      lightning-qat compare results/net.pt2 results/net_deploy_model.onnx --inputs real.npz

    The exit code is 1 if a number in the file is not the model's, or if a layer by itself is
    further away than rounding explains.
    """
    from lightning_qat.export.files.recognize import artifact_of
    from lightning_qat.insight.compare import compare as comparison_of

    artifact = artifact_of(file)
    converted = converted_model(model, trust=trust)
    given = None if inputs is None else model_inputs(converted, inputs)
    say(f"comparing {file}")
    with compared(file, model):
        found = comparison_of(converted, artifact, given)
    if as_json:
        print_json(found.to_dict())
    else:
        print(found)
    return FOUND if found.departure is not None or found.numbers else FINE
