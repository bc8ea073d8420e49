"""``lightning-qat export``."""

from __future__ import annotations

import json
import sys
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
    trust_option,
)
from lightning_qat.cli.console import say
from lightning_qat.cli.converted import CheckpointOptions, is_converted, load_converted
from lightning_qat.cli.delivered import is_fine, lines_of
from lightning_qat.cli.targets import available

if TYPE_CHECKING:
    from lightning_qat.export.delivery.result import Delivery


@command("export")
@click.argument("source", type=FILE)
@click.option("--to", required=True, metavar="TARGETS", help="Targets with commas: cann,tflite.")
@click.option("--out", required=True, type=FILE, metavar="FOLDER", help="Where the files go.")
@click.option("--module", metavar="PKG.CLASS", help="The LightningModule that was trained.")
@click.option(
    "--init-args",
    metavar="JSON",
    help="Arguments of its constructor that the checkpoint does not hold: JSON, YAML, or a file.",
)
@click.option(
    "--config",
    type=FILE,
    metavar="FILE.yaml",
    help="LightningCLI's configuration: the module, its arguments, and those of QATCallback.",
)
@click.option(
    "--example-inputs",
    metavar="SHAPE|FILE.npz",
    help="What forward takes: a shape (1,3,224,224), or an array per argument. By default the "
    "module's example_input_array.",
)
@click.option("--name", help="Beginning of the files' names.  [default: the class, in lower case]")
@trust_option
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="What each target may take, in a process of its own.  [default: no limit]",
)
@json_option
def export(
    source: Path,
    to: str,
    out: Path,
    module: str | None,
    init_args: str | None,
    config: Path | None,
    example_inputs: str | None,
    name: str | None,
    trust: bool,
    timeout: float | None,
    as_json: bool,
) -> int:
    """Export a QAT checkpoint, or a converted model, to files.

    SOURCE is a checkpoint of a run with QATCallback, or the .pt2 of a converted model. Nothing is
    trained: an export that failed after training is finished so. Every file is compared with the
    model, as after training.

      lightning-qat export runs/last.ckpt --module package.net.Net --to cann,tflite --out results

    writes results/net.pt2, the files of both targets, results/manifest.json and a page for people,
    results/report.html.

      lightning-qat export results/net.pt2 --to fake_quant_onnx --out results

    exports to one more target, without the checkpoint. The exit code is 1 if a target fails, with
    the others written, or if a file's numbers are not the model's.
    """
    from lightning_qat.export.delivery.export_all import export_all
    from lightning_qat.export.delivery.manifest import MANIFEST
    from lightning_qat.report.page import REPORT, report_or_reason

    exporters = available(to)
    options = CheckpointOptions(module, init_args, config, example_inputs, trust)
    model, default_name = load_converted(source, options)
    beginning = name or default_name
    out.mkdir(parents=True, exist_ok=True)
    say(f"exporting to {', '.join(exporter.name for exporter in exporters)}")
    saved = source if is_converted(source) else None
    delivery = export_all(model, exporters, out, beginning, saved=saved, timeout=timeout)
    has_manifest = MANIFEST not in delivery.unwritten
    has_report = has_manifest and delivery.interrupt is None
    if has_report:
        no_report = report_or_reason(out, model, name=beginning, exporters=exporters)
        if no_report is not None:
            print(f"lightning-qat export: {no_report}", file=sys.stderr)
            has_report = False
    if as_json and has_manifest:
        print_json(json.loads((out / MANIFEST).read_text(encoding="utf-8")))
    elif not as_json:
        print("\n".join(lines_of(delivery.results)))
        if has_manifest:
            print(f"manifest: {out / MANIFEST}")
        if has_report:
            print(f"report: {out / REPORT}")
    _say_what_failed(delivery)
    if delivery.interrupt is not None:
        raise delivery.interrupt
    fine = all(map(is_fine, delivery.results)) and not delivery.unwritten
    return FINE if fine else FOUND


def _say_what_failed(delivery: Delivery) -> None:
    problem = delivery.problem()
    if problem is not None:
        saved = delivery.model_file
        again = "the same command" if saved is None else f"lightning-qat export {saved}"
        todo = ",".join(delivery.failed)
        finish = f"To try what failed again: {again} --to {todo}\n" if todo else ""
        print(f"lightning-qat export: {problem}\n{finish}", end="", file=sys.stderr)
