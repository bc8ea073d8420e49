"""Accuracy of the files, at few bits: what is trained, and what each target's file computes.

For each seed a network is trained from its float checkpoint with the recipes of
``benchmarks.accuracy``, exported for every target, and every file runs on the test data in every
runtime. Given are means over seeds with their standard errors: the accuracy of the trained network,
the difference of the file's to it, and how many samples the file predicts as the trained network
does.

    python -m benchmarks.deployed --seeds 10
    python -m benchmarks.deployed --task mnist1d --tools learned --seeds 4

Integer targets round biases, which training does not. ``cann, float biases`` is the deploy model
with ``CannExporter(float_bias=True)``. Checkpoints are those of ``benchmarks.accuracy``, in the
same folder.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.accuracy.protocol import train, with_error
from benchmarks.accuracy.runs import Run, checkpoint
from benchmarks.accuracy.task import Data
from benchmarks.accuracy.tasks import TASKS
from benchmarks.accuracy.tools import Bits, named, tools
from lightning_qat import QuantizedModel, convert, export
from lightning_qat_exporters import CannExporter, FakeQuantOnnxExporter, TFLiteExporter

RATE = 4.0
"""Over that of the task; better than once or twice at few bits."""
OURS = ("learned", "first_last", "observed", "w4a8", "w4a4")
FILES: tuple[tuple[str, FakeQuantOnnxExporter | CannExporter | TFLiteExporter, str], ...] = (
    ("onnx", FakeQuantOnnxExporter(), "onnxruntime, no optimizations"),
    ("onnx", FakeQuantOnnxExporter(), "onnxruntime"),
    ("cann", CannExporter(), "reference executor"),
    ("cann, float biases", CannExporter(float_bias=True), "reference executor"),
    ("tflite", TFLiteExporter(), "LiteRT, XNNPACK"),
)
"""Name, exporter and runtime. Other runtimes of a deploy model compute the same."""


def trained(
    task: str, tool: str, bits: Bits, seed: int, folder: Path
) -> tuple[Data, QuantizedModel]:
    """A trained network, converted, and the data of its seed."""
    chosen, data = TASKS[task], TASKS[task].data(seed)
    model = checkpoint(chosen, data, Run(task, tool, named(bits), RATE, seed), folder)
    torch.manual_seed(seed)
    model = dict(tools())[tool].prepare(model, data.x, seed, bits)
    train(chosen, model, data, chosen.epochs, RATE * chosen.rate, seed)
    return data, convert(model.eval(), data.x_test[:4])


def files(model: QuantizedModel, data: Data, folder: Path) -> Iterator[tuple[str, float, float]]:
    """Of each file and runtime the accuracy and how many predictions are the model's, in %."""
    expected = model(data.x_test).argmax(1)
    right = 100 * float((expected == data.y_test).float().mean())
    yield "trained", right, 100.0
    arrays = {key: x.numpy() for key, x in model.flat_inputs((data.x_test,), {}).items()}
    for index, (name, exporter, runtime) in enumerate(FILES):
        artifact = export(model, exporter, folder / str(index))
        (given,) = exporter.run(artifact, runtime, arrays).values()
        found = torch.from_numpy(given).argmax(1)
        yield (
            f"{name}: {runtime}",
            100 * float((found == data.y_test).float().mean()),
            100 * float((found == expected).float().mean()),
        )


def table_of(task: str, chosen: list[str], seeds: int, folder: Path) -> Table:
    """A row for each recipe, width, file and runtime."""
    table = Table("recipe", "bits", "file: runtime", "accuracy, %", "to trained", "same, %")
    for tool in chosen:
        for bits in dict(tools())[tool].points:
            found: dict[str, list[tuple[float, float]]] = {}
            for seed in track(range(seeds), f"{tool} {named(bits)}"):
                data, model = trained(task, tool, bits, seed, folder)
                with tempfile.TemporaryDirectory() as written:
                    for name, right, same in files(model, data, Path(written)):
                        found.setdefault(name, []).append((right, same))
            base = [right for right, _ in found["trained"]]
            for name, rows in found.items():
                rights = [right for right, _ in rows]
                gains = [right - before for right, before in zip(rights, base, strict=True)]
                table.add_row(
                    tool, named(bits), name, with_error(rights), with_error(gains, "+"),
                    with_error([same for _, same in rows]),
                )  # fmt: skip
    return table


def main() -> None:
    """Print the table."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        "python -m benchmarks.deployed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", choices=("digits", "mnist1d"), default="digits",
                        help="default: digits")  # fmt: skip
    parser.add_argument("--tools", nargs="+", choices=OURS, default=["learned", "w4a4"],
                        help="recipes of benchmarks.accuracy; default: learned w4a4")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, help="networks per row (default: 3)")
    parser.add_argument("--folder", type=Path, default=Path("accuracy"), help="has checkpoints")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # torch's and the converters' own
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    made = table_of(options.task, options.tools, options.seeds, options.folder)
    Console(width=120).print(made)


if __name__ == "__main__":
    main()
