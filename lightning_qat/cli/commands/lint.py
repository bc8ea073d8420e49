"""``lightning-qat lint``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import click

from lightning_qat.cli.command import FILE, FINE, FOUND, command, json_option, print_json
from lightning_qat.cli.targets import PRODUCT, with_product

_RULES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "cann": ("cann", {}),
    "tensorrt": ("fake_quant_onnx", {"for_runtime": "tensorrt"}),
}
"""Whose rules are checked: the exporter that knows them, and its arguments."""


@command("lint")
@click.argument("model", type=FILE)
@click.option(
    "--for",
    "rules",
    type=click.Choice([*_RULES]),
    default="cann",
    show_default=True,
    help="Whose rules.",
)
@click.option("--product", metavar="SOC", help=PRODUCT)
@json_option
def lint(model: Path, rules: str, product: str | None, as_json: bool) -> int:
    """Check a CANN deploy model, or a QDQ model for TensorRT.

    A deploy MODEL (AscendQuant, AscendDequant) is checked against every rule that ATC's parser and
    kernels are known to have, where no device is at hand. Errors are refused or computed wrongly,
    warnings concern some products or versions, advice may help.

      lightning-qat lint results/model_deploy_model.onnx

    or a QDQ model of any tool against the rules of TensorRT's parser and documents:

      lightning-qat lint --for tensorrt results/model_qdq.onnx
    """
    from lightning_qat.export.lint import Linting

    name, arguments = _RULES[rules]
    target = with_product(name, arguments, product)
    assert isinstance(target, Linting)  # ours
    findings = target.lint(model)
    counts = {s: sum(f.severity == s for f in findings) for s in ("error", "warning", "advice")}
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        told = (
            f"{counts['error']} errors, {counts['warning']} warnings, {counts['advice']} pieces of "
            "advice"
        )
        print("\n".join([*map(str, findings), f"{model}: {told}"]))
    return FOUND if counts["error"] else FINE
