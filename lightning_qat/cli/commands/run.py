"""``lightning-qat run``."""

from __future__ import annotations

from pathlib import Path

import click

from lightning_qat.cli.command import FILE, FINE, command, json_option, print_json


@command("run")
@click.argument("model", type=FILE)
@click.option(
    "--inputs",
    required=True,
    type=FILE,
    metavar="FILE.npz",
    help="An array per input of the model, by its name, of its type and shape.",
)
@click.option(
    "--out", required=True, type=FILE, metavar="FILE.npz", help="Where to write the outputs."
)
@json_option
def run(model: Path, inputs: Path, out: Path, as_json: bool) -> int:
    """Run an ONNX model on arrays, on this machine, in ONNX Runtime.

    A deploy MODEL (AscendQuant, AscendDequant, AscendAntiQuant, device nodes of LSTM and GRU) is
    rewritten as standard operators first: products of integers are exact, scalings are in float32.
    Any other MODEL, with QDQ pairs or float, is computed as it is written, without ONNX Runtime's
    optimizations.

      python -c "import numpy as np; np.savez('in.npz', x=np.zeros((1, 3, 224, 224), np.float32))"
      lightning-qat run results/model_deploy_model.onnx --inputs in.npz --out out.npz

    writes an array per output of the model, by its name, to out.npz.
    """
    from lightning_qat.export.run_file import run_file

    arrays = run_file(model, inputs, out)
    if as_json:
        shapes = {n: {"dtype": str(a.dtype), "shape": [*a.shape]} for n, a in arrays.items()}
        print_json({"outputs": shapes, "file": str(out)})
        return FINE
    for name, array in arrays.items():
        print(f"{name}: {array.dtype} {list(array.shape)}")
    print(f"outputs: {out}")
    return FINE
