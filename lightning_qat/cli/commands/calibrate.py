"""``lightning-qat calibrate``."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

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
from lightning_qat.cli.delivered import is_fine, lines_of
from lightning_qat.cli.module_class import LightningConfig
from lightning_qat.cli.targets import available
from lightning_qat.cli.trained_module import module_class, require_checkpoint, trained_module
from lightning_qat.cli.validation_data import data_module

if TYPE_CHECKING:
    from lightning_qat.callback.qat_callback import QATCallback


@command("calibrate")
@click.argument("checkpoint", type=FILE, metavar="CKPT")
@click.option("--to", required=True, metavar="TARGETS", help="Targets with commas: cann,tflite.")
@click.option("--out", required=True, type=FILE, metavar="FOLDER", help="Where the files go.")
@project_options
@click.option(
    "--recipe",
    default="int8",
    show_default=True,
    metavar="NAME|FILE",
    help="What is quantized how.",
)
@click.option(
    "--batches",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    metavar="N",
    help="Training batches that give the ranges.",
)
@click.option(
    "--correct-biases/--no-correct-biases",
    default=True,
    show_default=True,
    help="Take the shift of each layer's mean back, on as many batches more.",
)
@trust_option
@json_option
def calibrate(
    checkpoint: Path,
    to: str,
    out: Path,
    config: Path | None,
    module: str | None,
    datamodule: str | None,
    init_args: str | None,
    recipe: str,
    batches: int,
    correct_biases: bool,
    trust: bool,
    as_json: bool,
) -> int:
    """Quantize a float checkpoint without training, and export it.

    CKPT is a checkpoint of float training. Training batches run in eval mode and without gradients:
    the first ones give the ranges, and as many more the biases that take back what rounding shifts.
    Files, manifest and report are those of an export after training.

      lightning-qat calibrate float.ckpt --config config.yaml --to cann,tflite --out results

    At 8 bits that is often enough; below, training with QATCallback gains more. The exit code is 1
    if a target fails, with the others written, or if a file's numbers are not the model's.
    """
    require_checkpoint(checkpoint)
    exporters = available(to)
    said = None if config is None else LightningConfig(config)
    cls = module_class(checkpoint, module, said)
    # What the module prints is not our output.
    with redirect_stdout(sys.stderr):
        from lightning_qat.callback.calibration.fit_silently import fit_silently
        from lightning_qat.callback.qat_callback import QATCallback
        from lightning_qat.checkpoint.load import load_float_or_qat_checkpoint as load
        from lightning_qat.quantizers.base import Quantizer
        from lightning_qat.recipe.recipe import Recipe
        from lightning_qat.recipe.schedule import Schedule

        chosen = Recipe.load(recipe)
        net = trained_module(cls, checkpoint, load, init_args=init_args, config=said, trust=trust)
        if any(isinstance(part, Quantizer) for part in net.modules()):
            raise ValueError(
                f"calibrate takes a float checkpoint; {str(checkpoint)!r} is quantized already, "
                "and its trained ranges would be lost. Export it: lightning-qat export "
                f"{checkpoint} --to {to}"
            )
        data = data_module(datamodule, said)
        say(f"calibrating on {batches} training batches")
        callback = QATCallback(
            chosen,
            Schedule.calibrate(batches, correct_biases),
            exporters=exporters,
            export_dir=out,
            on_export_error="warn",
        )
        fit_silently(net, data, callback, out)
    return _show(callback, out, as_json=as_json)


def _show(callback: QATCallback, out: Path, *, as_json: bool) -> int:
    from lightning_qat.export.delivery.manifest import MANIFEST
    from lightning_qat.report.page import REPORT

    if as_json:
        print_json(json.loads((out / MANIFEST).read_text(encoding="utf-8")))
    else:
        print("\n".join(lines_of(callback.delivered)))
        for kind, name in (("manifest", MANIFEST), ("report", REPORT)):
            if (out / name).is_file():
                print(f"{kind}: {out / name}")
    return FINE if all(map(is_fine, callback.delivered)) else FOUND
