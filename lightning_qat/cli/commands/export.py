"""``lightning-qat export``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lightning_qat.cli.command import FILE, FINE, FOUND, command, json_option, trust_option
from lightning_qat.cli.console import say
from lightning_qat.cli.converted import CheckpointOptions, is_converted, load_converted
from lightning_qat.cli.targets import available

if TYPE_CHECKING:
    from lightning_qat.export.manifest import ExportResult


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
    from lightning_qat.export.manifest import MANIFEST, export_all
    from lightning_qat.report.page import REPORT, report_or_reason

    exporters = available(to)
    options = CheckpointOptions(module, init_args, config, example_inputs, trust)
    model, default_name = load_converted(source, options)
    beginning = name or default_name
    out.mkdir(parents=True, exist_ok=True)
    if not is_converted(source):
        model.save(out / f"{beginning}.pt2")
    say(f"exporting to {', '.join(exporter.name for exporter in exporters)}")
    results = export_all(model, exporters, out, beginning)
    no_report = report_or_reason(out, model, name=beginning, exporters=exporters)
    if no_report is not None:
        print(f"lightning-qat export: {no_report}", file=sys.stderr)
    if as_json:
        print((out / MANIFEST).read_text(encoding="utf-8"), end="")
    else:
        print("\n".join(_lines(results)))
        print(f"manifest: {out / MANIFEST}")
        if no_report is None:
            print(f"report: {out / REPORT}")
    return FINE if all(map(_is_fine, results)) else FOUND


def _is_fine(result: ExportResult) -> bool:
    agreement = result.agreement
    return result.error is None and not (agreement and agreement.parameter_differences)


def _lines(results: Sequence[ExportResult]) -> list[str]:
    lines = []
    for result in results:
        if result.agreement is not None:
            lines.append(str(result.agreement))
        if result.error is not None:
            lines.append(f"{result.target}: failed: {type(result.error).__name__}: {result.error}")
        if result.artifact is not None:
            told = (*result.artifact.differences, *result.artifact.notes)
            lines += [f"  {note}" for note in told]
            lines += [f"  {role}: {path}" for role, path in result.artifact.files.items()]
    return lines
