"""A quantized ONNX model of another tool, brought to Huawei Ascend and checked.

    python -m examples.third_party_qdq

ONNX Runtime quantizes a float model after training; any tool that writes QuantizeLinear and
DequantizeLinear does. ``convert_qat_model`` turns the pairs into Ascend's operators, ``lint`` holds
the result against the rules that ATC is known to have, and both files run on the test images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import onnxruntime as ort
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from examples.digits import Digits, DigitsNet
from lightning_qat import convert_qat_model
from lightning_qat_exporters import CannExporter


class Images(CalibrationDataReader):  # type: ignore[misc]
    """What ONNX Runtime calibrates with, a batch at a time."""

    def __init__(self, images: torch.Tensor, batch: int = 64) -> None:
        self.batches = iter(torch.split(images, batch))

    def get_next(self) -> Any:  # a dictionary, or None at the end
        batch = next(self.batches, None)
        return None if batch is None else {"x": batch.numpy()}


def other_tool(net: torch.nn.Module, images: torch.Tensor, out: Path) -> Path:
    """A float model as ONNX, quantized by ONNX Runtime: stands for the file that you have."""
    batch = {"x": {0: torch.export.Dim("batch")}}
    torch.onnx.export(
        net.eval(),
        (images[:2],),
        out / "float.onnx",
        input_names=["x"],
        dynamic_shapes=batch,
        verbose=False,
    )
    quant_pre_process(out / "float.onnx", out / "clean.onnx")
    quantize_static(
        out / "clean.onnx",
        out / "model_qdq.onnx",
        Images(images),
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    return out / "model_qdq.onnx"


def main(epochs: int = 20, out: Path = Path("qat_export")) -> tuple[float, float]:
    """Share of predictions that equal the other tool's file, and its accuracy, in percent."""
    L.seed_everything(0, verbose=False)
    out.mkdir(parents=True, exist_ok=True)
    data, net = Digits(), DigitsNet()
    L.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False).fit(
        net, data
    )
    model_file = other_tool(net, data.train_set.tensors[0], out)

    conversion = convert_qat_model(model_file, out / "model", out / "record.txt")
    print(conversion)  # what is on integers, what stays real and why
    deploy = conversion.files["model"]
    for finding in CannExporter().lint(deploy):
        print(finding)

    x, y = data.test_x.numpy(), data.test_y.numpy()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    theirs = np.asarray(ort.InferenceSession(model_file, options).run(None, {"x": x})[0])
    (ours,) = CannExporter().run_file(deploy, {"x": x}).values()
    same = 100 * float(np.mean(theirs.argmax(1) == ours.argmax(1)))
    accuracy = 100 * float(np.mean(ours.argmax(1) == y))
    print(f"{same:.2f} % predicted as the other tool's file, {accuracy:.2f} % right")
    return same, accuracy


if __name__ == "__main__":
    main()
