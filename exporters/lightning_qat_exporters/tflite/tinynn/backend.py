"""TFLite through TinyNeuralNetwork's converter.

The captured program is lowered to integer operators (``lowering``), traced, and converted by
``TFLiteConverter``, to which these operators are added for the time of the call (``converters``).
The converter chooses layouts, folds constants, removes transposes and writes the file; every number
in the file is the model's. No quantized kernel of torch is run, so torch's engine does not matter.
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

import torch

from lightning_qat.export.protocol import MissingDependency, Unsupported, UnsupportedByTarget
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat_exporters.tflite.flatbuffer.file import unpack
from lightning_qat_exporters.tflite.tinynn.lower_ops import LOWER_FUNCTIONS
from lightning_qat_exporters.tflite.tinynn.lower_value_preserving import VALUE_PRESERVING
from lightning_qat_exporters.tflite.tinynn.lowering import LITERT, Lowering
from lightning_qat_exporters.tflite.tinynn.private import contained

_INSTALL = (
    "pip install igraph flatbuffers PyYAML 'ruamel.yaml<0.18', then pip install --no-deps "
    "git+https://github.com/alibaba/TinyNeuralNetwork"
)
_ELSE = 'Or use backend="litert"'


def check_available() -> None:
    """See whether TinyNeuralNetwork can be imported.

    Raises:
        MissingDependency: It is not installed, another package has its name, or its import fails.
    """
    with contained():
        _converter_class()


def convert(model: QuantizedModel, *, io: str, layout: str) -> Any:
    """Make a TFLite file of a converted model.

    The file takes one sample where the model's batch is dynamic. Its graph is int8 also with
    ``io="uint8"``, where a QUANTIZE at either end moves integers by 128, which is exact: TFLite's
    specification defines int8 only, uint8 kernels are a subset kept for old files, and integers
    of weights stay the model's.

    Args:
        model: The converted model.
        io: Type of inputs and outputs: ``float``, ``int8`` or ``uint8``.
        layout: Layout of four-dimensional inputs and outputs: ``nhwc`` or ``nchw``.

    Returns:
        The unpacked file, without a signature.

    Raises:
        MissingDependency: TinyNeuralNetwork cannot be imported.
        UnsupportedByTarget: With everything this backend cannot express.
    """
    with contained(), tempfile.TemporaryDirectory() as folder, torch.no_grad():
        converter_class = _converter_class()
        graph, samples = Lowering(
            model, LOWER_FUNCTIONS, VALUE_PRESERVING, integer_io=io != "float"
        ).run()
        # Needs TinyNeuralNetwork at its top.
        from lightning_qat_exporters.tflite.tinynn.converters import extended

        path = Path(folder) / "model.tflite"
        with extended():
            converter = converter_class(
                graph,
                samples,
                str(path),
                nchw_transpose=layout == "nhwc",
                quantize_target_type="int8",
                fuse_quant_dequant=io == "uint8",
                quantize_input_output_type="uint8" if io == "uint8" else None,
            )
            try:
                converter.convert()
            except Exception as error:
                # It asserts what it does not support, deep inside and of many types.
                reason = f"TinyNeuralNetwork's converter failed: {type(error).__name__}: {error}"
                problem = Unsupported("the network", reason.splitlines()[0].rstrip("."), LITERT)
                raise UnsupportedByTarget("tflite", (problem,)) from error
        return unpack(path.read_bytes())


def _converter_class() -> Any:
    try:
        importlib.import_module("tinynn")
        module = importlib.import_module("tinynn.converter")
    except ModuleNotFoundError as error:
        if error.name == "tinynn":
            raise MissingDependency(
                "TinyNeuralNetwork is not installed. It is not on the package index, where "
                f"'tinynn' is another project. Install it from its repository: {_INSTALL}. "
                f"{_ELSE}."
            ) from error
        if error.name == "tinynn.converter":
            raise _wrong_package() from error
        raise _import_failed(error) from error
    except Exception as error:
        raise _import_failed(error) from error
    found = getattr(module, "TFLiteConverter", None)
    if found is None:
        raise _wrong_package()
    return found


def _wrong_package() -> MissingDependency:
    return MissingDependency(
        "The installed package 'tinynn' is not TinyNeuralNetwork: it has no "
        "tinynn.converter.TFLiteConverter. The package index's 'tinynn' is another project. "
        f"Remove it (pip uninstall tinynn) and install the right one from its repository: "
        f"{_INSTALL}. {_ELSE}."
    )


def _import_failed(error: Exception) -> MissingDependency:
    return MissingDependency(
        f"TinyNeuralNetwork is installed and cannot be imported: {type(error).__name__}: {error}. "
        "It needs igraph, flatbuffers, PyYAML, ruamel.yaml below 0.18 and, from Python 3.12 on, "
        f"setuptools; a torchvision that does not fit torch breaks it too. {_ELSE}."
    )
