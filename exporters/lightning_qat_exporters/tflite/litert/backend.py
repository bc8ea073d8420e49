"""The ``litert`` backend: Google's litert-torch, from the package index alone."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from typing import Any

import torch
from packaging.requirements import Requirement

from lightning_qat.export.protocol import MissingDependency, Unsupported, UnsupportedByTarget
from lightning_qat.ir.exported_program import module_path
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat_exporters.quiet import last_lines, quietly
from lightning_qat_exporters.tflite.flatbuffer.file import prune, unpack
from lightning_qat_exporters.tflite.litert.conv_transpose_op import lower, without_biases
from lightning_qat_exporters.tflite.litert.lowering import Lowered
from lightning_qat_exporters.tflite.litert.private import registered, without_progress
from lightning_qat_exporters.tflite.litert.requantize import remove_marks

INSTALL = "pip install 'lightning-qat[tflite]'"


def check_available() -> None:
    """Find litert-torch without importing it, which takes seconds.

    Raises:
        MissingDependency: It is not installed, or made for another torch.
    """
    if find_spec("litert_torch") is None:
        raise MissingDependency(
            f"TFLite export with backend 'litert' needs the package litert-torch: {INSTALL} "
            "(about 2 GB)."
        )
    for text in _requirements():
        wanted = Requirement(text)
        if wanted.name == "torch" and not wanted.specifier.contains(
            torch.__version__, prereleases=True
        ):
            raise MissingDependency(
                f"litert-torch {version('litert-torch')} needs torch{wanted.specifier}; this is "
                f"torch {torch.__version__}. Install versions that fit: {INSTALL}."
            )


def _requirements() -> list[str]:
    try:
        return requires("litert-torch") or []
    except PackageNotFoundError:
        # Put on the path without being installed: nothing says which torch it wants.
        return []


def convert(model: QuantizedModel, *, io: str, layout: str) -> Any:
    """Convert a model to a TFLite file with the model's own integers and scales.

    litert-torch runs in its static mode, in which the converter turns every operator between
    quantized tensors into an integer one and leaves all others float behind DEQUANTIZE. The
    quantizer object only selects that mode; nothing is calibrated.

    Args:
        model: The converted model.
        io: Not read here: quantized inputs and outputs are always integers.
        layout: ``nhwc`` or ``nchw``, of 4-D inputs and outputs.

    Returns:
        The unpacked file, with one signature that has the model's names.

    Raises:
        UnsupportedByTarget: litert-torch cannot express an operator.
    """
    lowered = Lowered(model, channels_last=layout == "nhwc")
    with without_progress(), quietly("TFLite: converting with litert-torch") as printed:
        import litert_torch
        from litert_torch.quantize import pt2e_quantizer
        from litert_torch.quantize.quant_config import QuantConfig

        static = pt2e_quantizer.get_symmetric_quantization_config(
            is_per_channel=True, is_dynamic=False
        )
        quantizer = pt2e_quantizer.PT2EQuantizer().set_global(static)
        operator = torch.ops.lightning_qat_litert.transpose_conv.default
        try:
            with registered(operator, lower):
                converted = litert_torch.convert(
                    lowered, lowered.example_inputs, quant_config=QuantConfig(quantizer)
                )
                content = converted.model_content()
        except Exception as error:
            raise _unsupported(error, last_lines(printed), model) from error
    file = unpack(content)
    remove_marks(file, lowered.mark)
    without_biases(file)
    prune(file)
    _name_ends(file, model)
    return file


def _unsupported(error: Exception, printed: str, model: QuantizedModel) -> UnsupportedByTarget:
    first = (str(error).strip().splitlines() or ["no message"])[0]
    said = f"; it printed: {printed}" if printed else ""
    problems = (
        Unsupported(
            place,
            f"litert-torch could not convert it: {type(error).__name__}: {first}{said}",
            "Replace the operator that it names by one that LiteRT has, or try backend='tinynn'",
        )
        for place in _places_of(first, model) or ["the model"]
    )
    return UnsupportedByTarget("tflite", problems)


def _places_of(message: str, model: QuantizedModel) -> list[str]:
    """The modules that call the operator which a message names, or one that is decomposed to it."""
    named = re.search(r"\baten\.(\w+)", message)
    if named is None:
        return []
    wanted = f"{named[1].strip('_')}_"
    found = []
    for node in model.program.graph.nodes:
        name = str(getattr(node.target, "overloadpacket", "")).removeprefix("aten.").strip("_")
        if name and wanted.startswith(f"{name}_"):
            path = module_path(node)
            found.append(f"{path}, {name}" if path else name)
    return list(dict.fromkeys(found))


def _name_ends(file: Any, model: QuantizedModel) -> None:
    """litert-torch calls inputs ``args_0`` and outputs ``output_0``, counted in our order."""
    (signature,) = file.signatureDefs
    for entries, prefix, names in (
        (signature.inputs, b"args_", model.input_names),
        (signature.outputs, b"output_", model.output_names),
    ):
        for entry in entries:
            entry.name = names[int(entry.name.removeprefix(prefix))].encode()
