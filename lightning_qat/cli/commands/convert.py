"""``lightning-qat convert``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from lightning_qat.cli.command import FILE, FINE, command, json_option, print_json
from lightning_qat.cli.targets import PRODUCT, with_product


@command("convert")
@click.argument("model", type=FILE)
@click.option("--to", required=True, metavar="TARGET", help="The target; 'cann' is Huawei Ascend.")
@click.option(
    "--out", required=True, type=FILE, metavar="PREFIX", help="Beginning of the files' names."
)
@click.option(
    "--record",
    type=FILE,
    metavar="FILE",
    help="Also write AMCT's record of factors, as text or as .pb.",
)
@click.option(
    "--float-bias",
    is_flag=True,
    help="Keep biases in float, added after the layers, instead of rounding them to int32.",
)
@click.option(
    "--grid-weights",
    is_flag=True,
    help="Take float weights on a grid as integers; TensorFlow's converters write such.",
)
@click.option(
    "--max-bytes",
    type=click.IntRange(min=0),
    metavar="N",
    help="Most bytes that the model's tensors may take in memory.  "
    "[default: 16 times its files, and 1 GiB in any case]",
)
@click.option("--product", metavar="SOC", help=PRODUCT)
@json_option
def convert(
    model: Path,
    to: str,
    out: Path,
    record: Path | None,
    float_bias: bool,
    grid_weights: bool,
    max_bytes: int | None,
    product: str | None,
    as_json: bool,
) -> int:
    """Convert a quantized ONNX model of any tool for an integer target.

    MODEL has QuantizeLinear and DequantizeLinear, opset 10 or newer, and its external data beside
    it. What does not match a quantized pattern stays float and is listed.

      lightning-qat convert model_qat.onnx --to cann --out results/model --record results/model.txt

    writes results/model_deploy_model.onnx for ATC, results/model_fake_quant_model.onnx with the
    same numbers for ONNX Runtime, and AMCT's record of scales and offsets. Then, on a machine with
    CANN:

      atc --framework=5 --model=results/model_deploy_model.onnx --output=model --soc_version=...
    """
    from lightning_qat.export.convert_onnx import convert_qat_model

    done = convert_qat_model(
        model,
        out,
        record,
        target=with_product(to, {}, product),
        float_bias=float_bias,
        grid_weights=grid_weights,
        max_bytes=max_bytes,
    )
    if as_json:
        print_json(asdict(done))
    else:
        print(done)
    return FINE
