"""``lightning-qat report``."""

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


@command("report")
@click.argument("folder", type=FILE)
@click.option(
    "--model",
    type=FILE,
    metavar="MODEL.pt2",
    help="The converted model.  [default: the one in FOLDER]",
)
@inputs_option
@trust_option
@json_option
def report(
    folder: Path, model: Path | None, inputs: Path | None, trust: bool, as_json: bool
) -> int:
    """Write one page on an export: what was quantized, how well, and where its files differ.

    FOLDER is what an export has written: manifest.json, the converted model (.pt2) and the files.
    The page is FOLDER/report.html. It holds everything that it shows, and opens in any browser.

      lightning-qat report results --inputs real.npz

    Nothing is exported anew, and the manifest stays as it is. The exit code is 1 if a file of the
    manifest is missing or is not what was exported; the page names it.
    """
    from lightning_qat.report.folder import find_model, read_manifest, require_model_of
    from lightning_qat.report.page import write_report

    manifest = read_manifest(folder)
    path = model or find_model(folder, manifest)
    converted = converted_model(path, trust=trust)
    require_model_of(manifest, converted, path)
    given = None if inputs is None else model_inputs(converted, inputs)
    say(f"reporting on {path}")
    written, gone = write_report(folder, converted, name=path.stem, inputs=given)
    if as_json:
        print_json({"report": str(written), "files": list(gone)})
    else:
        print("\n".join([*gone, f"report: {written}"]))
    return FOUND if gone else FINE
