"""Run a deploy model in ONNX Runtime, as standard operators."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx

from lightning_qat.export.protocol import Array
from lightning_qat_exporters.cann.standard_operators.recurrent import RECURRENT
from lightning_qat_exporters.cann.standard_operators.translate import ASCEND, as_standard_operators
from lightning_qat_exporters.onnx_files.read import read_onnx
from lightning_qat_exporters.onnx_files.run import OnnxSession
from lightning_qat_exporters.onnx_files.write import save_onnx


def is_deploy(model: onnx.ModelProto) -> bool:
    """Whether a model has Ascend's operators."""
    return any(node.op_type in (*ASCEND, *RECURRENT) for node in model.graph.node)


class DeploySession(OnnxSession):
    """A deploy model, ready to run on arrays.

    Args:
        path: The deploy model.

    Raises:
        FileNotFoundError: There is no such file, or its external data is missing.
        ValueError: It is no ONNX model.
        NoStandardForm: Nodes of it have no form in standard operators; all are named.
    """

    def __init__(self, path: Path) -> None:
        model = read_onnx(path, standard=False)
        self._alarms = as_standard_operators(model)
        # As a file, since protobuf holds no 2 GB.
        with TemporaryDirectory() as folder:
            standard = Path(folder) / path.name
            save_onnx(model, standard)
            super().__init__(standard, optimize=True)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute the outputs.

        Raises:
            ValueError: A tensor to quantize holds NaN, or an accumulator of 8-bit data leaves
                int32.
        """
        outputs = super().run(inputs)
        wrong = [text for name, text in self._alarms.items() if outputs.pop(name)]
        if wrong:
            raise ValueError(" ".join(wrong))
        return outputs
