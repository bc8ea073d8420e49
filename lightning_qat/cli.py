"""The command line: convert, lint and run quantized ONNX models; needs no Lightning.

What takes a second to import is imported by the command that needs it, so that help comes at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

_CONVERT = """\
Convert a quantized ONNX model of any tool (QuantizeLinear and DequantizeLinear, opset 10 or newer)
for an integer target. What does not match a quantized pattern stays float and is listed.

  lightning-qat convert model_qat.onnx --to cann --out results/model --record results/model.txt

writes results/model_deploy_model.onnx for ATC, results/model_fake_quant_model.onnx with the same
numbers for ONNX Runtime, and AMCT's record of scales and offsets. Then, on a machine with CANN:

  atc --framework=5 --model=results/model_deploy_model.onnx --output=model --soc_version=...
"""
_LINT = """\
Check a deploy model (AscendQuant, AscendDequant) against every rule that ATC's parser and kernels
are known to have, where no device is at hand. Errors are refused or computed wrongly, warnings
concern some products or versions, advice may help.

  lightning-qat lint results/model_deploy_model.onnx

or a QDQ model of any tool against the rules of TensorRT's parser and documents:

  lightning-qat lint --for tensorrt results/model_qdq.onnx
"""
_RULES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "cann": ("cann", {}),
    "tensorrt": ("fake_quant_onnx", {"for_runtime": "tensorrt"}),
}
"""Whose rules ``lint`` checks: the exporter that knows them, and its arguments."""

_RUN = """\
Run an ONNX model on arrays, on this machine, in ONNX Runtime. A deploy model (AscendQuant,
AscendDequant, AscendAntiQuant, device nodes of LSTM and GRU) is rewritten as standard operators
first: products of integers are exact, scalings are in float32. Any other model, with QDQ pairs or
float, is computed as it is written, without ONNX Runtime's optimizations.

  python -c "import numpy as np; np.savez('in.npz', x=np.zeros((1, 3, 224, 224), np.float32))"
  lightning-qat run results/model_deploy_model.onnx --inputs in.npz --out out.npz

writes an array per output of the model, by its name, to out.npz.
"""
_EXIT = "Exit codes: 0 all is well, 1 lint found errors, 2 the command or its input is wrong."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows the program's name; ``sys.argv`` by default.

    Returns:
        0 if all is well, 1 if lint found errors, 2 if the input cannot be used.
    """
    options = _parser().parse_args(arguments)
    from lightning_qat.export.protocol import MissingDependency

    command = {"convert": _convert, "lint": _lint, "run": _run}[options.command]
    try:
        return command(options)
    except (ValueError, OSError, MissingDependency) as error:
        print(f"lightning-qat {options.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lightning-qat",
        description="Quantized models for integer targets. Training is Python: see QATCallback.",
        epilog=_EXIT,
    )
    parser.add_argument("--version", action="version", version=version("lightning-qat"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, summary: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=text,
            epilog=_EXIT,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    convert = command("convert", "convert a quantized ONNX model of any tool", _CONVERT)
    convert.add_argument("model", type=Path, help="the QDQ model, with its external data beside it")
    convert.add_argument(
        "--to", required=True, metavar="TARGET", help="the target; 'cann' is Huawei Ascend"
    )
    convert.add_argument(
        "--out", required=True, type=Path, metavar="PREFIX", help="beginning of the files' names"
    )
    convert.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="also write AMCT's record of factors, as text or as .pb",
    )
    convert.add_argument(
        "--float-bias",
        action="store_true",
        help="keep biases in float, added after the layers, instead of rounding them to int32",
    )
    convert.add_argument(
        "--grid-weights",
        action="store_true",
        help="take float weights on a grid as integers; TensorFlow's converters write such",
    )
    lint = command("lint", "check a CANN deploy model, or a QDQ model for TensorRT", _LINT)
    lint.add_argument("model", type=Path, help="the deploy model, or the QDQ model")
    lint.add_argument(
        "--for", dest="rules", choices=_RULES, default="cann", help="whose rules (default: cann)"
    )
    for with_product in (convert, lint):
        with_product.add_argument(
            "--product",
            metavar="SOC",
            help="the Ascend product, as ATC's --soc_version begins: Ascend310P, Ascend910B, ...",
        )
    lint.add_argument("--json", action="store_true", help="findings as a JSON list")
    run = command("run", "run a deploy or QDQ model in ONNX Runtime", _RUN)
    run.add_argument("model", type=Path, help="the ONNX model, with its external data beside it")
    run.add_argument(
        "--inputs",
        required=True,
        type=Path,
        metavar="FILE.npz",
        help="an array per input of the model, by its name, of its type and shape",
    )
    run.add_argument(
        "--out", required=True, type=Path, metavar="FILE.npz", help="where to write the outputs"
    )
    return parser


def _convert(options: argparse.Namespace) -> int:
    from lightning_qat.export.convert_onnx import convert_qat_model

    done = convert_qat_model(
        options.model,
        options.out,
        options.record,
        target=_with_product(options.to, {}, options.product),
        float_bias=options.float_bias,
        grid_weights=options.grid_weights,
    )
    print(done)
    return 0


def _with_product(name: str, arguments: Mapping[str, Any], product: str | None) -> Any:
    """A target's exporter; ``--product`` is an option of cann's alone."""
    from lightning_qat.export.load import load_exporter

    if product is not None and name != "cann":
        raise ValueError(
            f"--product names an Ascend product; the target is {name!r}. Leave it out."
        )
    options = {} if product is None else {"product": product}
    return type(load_exporter(name))(**arguments, **options)


def _lint(options: argparse.Namespace) -> int:
    from lightning_qat.export.lint import Linting

    name, arguments = _RULES[options.rules]
    target = _with_product(name, arguments, options.product)
    assert isinstance(target, Linting)  # ours
    findings = target.lint(options.model)
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        counts = {s: sum(f.severity == s for f in findings) for s in ("error", "warning", "advice")}
        lines = [*map(str, findings), f"{options.model}: " + _counted(counts)]
        print("\n".join(lines))
    return int(any(finding.severity == "error" for finding in findings))


def _run(options: argparse.Namespace) -> int:
    from lightning_qat.export.run_file import run_file

    for name, array in run_file(options.model, options.inputs, options.out).items():
        print(f"{name}: {array.dtype} {list(array.shape)}")
    print(f"outputs: {options.out}")
    return 0


def _counted(counts: dict[str, int]) -> str:
    return (
        f"{counts['error']} errors, {counts['warning']} warnings, {counts['advice']} pieces of "
        "advice"
    )


if __name__ == "__main__":
    sys.exit(main())
