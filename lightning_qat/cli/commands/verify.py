"""``lightning-qat verify``."""

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


@command("verify")
@click.argument("model", type=FILE, metavar="MODEL.pt2")
@click.argument("files", type=FILE, nargs=-1, required=True, metavar="FILE...")
@inputs_option
@trust_option
@json_option
def verify(
    model: Path, files: tuple[Path, ...], inputs: Path | None, trust: bool, as_json: bool
) -> int:
    """Compare exported files with the converted model.

    MODEL.pt2 is the converted model that lies beside the files after an export. Every scale, zero
    point and integer in each FILE is compared with the model's, and its outputs where it runs here.
    Real inputs tell more than noise.

      lightning-qat verify results/net.pt2 results/net.tflite --inputs real.npz

    The exit code is 1 if a number in a file is not the model's. Outputs decide nothing: runtimes
    round otherwise than torch does.
    """
    from lightning_qat.export.files.recognize import artifact_of
    from lightning_qat.export.verify import verify as agreement_of

    # Two files may belong together.
    artifacts = {tuple(a.files.values()): a for a in map(artifact_of, files)}
    converted = converted_model(model, trust=trust)
    given = None if inputs is None else model_inputs(converted, inputs)
    source = None if inputs is None else str(inputs)
    found = []
    for artifact in artifacts.values():
        say(f"verifying {artifact.files['model']}")
        with compared(artifact.files["model"], model):
            found.append(agreement_of(converted, artifact, given, source=source))
    if as_json:
        print_json([agreement.to_dict() for agreement in found])
    else:
        print("\n".join(map(str, found)))
    return FOUND if any(agreement.parameter_differences for agreement in found) else FINE
