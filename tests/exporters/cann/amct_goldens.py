"""AMCT's own files, and a comparison of deploy models around every quantized layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from lightning_qat.amct.layer_record import LayerRecord
from lightning_qat.amct.record import parse_record

GOLDENS = Path(__file__).parents[2] / "goldens" / "amct"
CASES = (
    *("conv_arq_cw", "conv_arq_pt", "conv_ulq_cw", "conv_dw", "conv_deconv"),
    *("conv_a16w8", "conv1d", "branch", "lin3d"),
)
COMPUTE_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

Array = NDArray[Any]


@dataclass(frozen=True)
class Case:
    """One network as AMCT trained and wrote it."""

    name: str
    deploy_path: Path
    deploy: onnx.ModelProto
    record_text: str
    records: dict[str, LayerRecord]
    state: dict[str, Array]
    inputs: dict[str, Array]
    outputs: list[Array]

    def tensor_state(self, layer: str) -> dict[str, Array]:
        """A layer's ``weight``, ``bias``, ``wts_scales`` and batch norm, where it has them."""
        names = {
            "quant_module.replaced_module.weight": "weight",
            "quant_module.replaced_module.bias": "bias",
            "quant_module.wts_scales": "wts_scales",
            "bn_module.weight": "bn.gamma",
            "bn_module.bias": "bn.beta",
            "bn_module.running_mean": "bn.mean",
            "bn_module.running_var": "bn.var",
        }
        return {
            short: self.state[f"{layer}.{long}"]
            for long, short in names.items()
            if f"{layer}.{long}" in self.state
        }


def load_case(name: str) -> Case:
    """Read one folder of golden files; the inputs carry the deploy model's names."""
    folder = GOLDENS / name
    deploy = onnx.load(folder / "m_deploy_model.onnx")
    arrays = np.load(folder / "io.npz")
    text = (folder / "record.txt").read_text()
    state = torch.load(folder / "qat.pth", map_location="cpu", weights_only=True)
    return Case(
        name=name,
        deploy_path=folder / "m_deploy_model.onnx",
        deploy=deploy,
        record_text=text,
        records={record.name: record for record in parse_record(text)},
        state={key: value.numpy() for key, value in state.items()},
        inputs={v.name: arrays[f"in{i}"] for i, v in enumerate(deploy.graph.input)},
        outputs=[arrays[f"fq_out{i}"] for i in range(len(deploy.graph.output))],
    )


@dataclass(frozen=True)
class LayerView:
    """Everything a deploy model says about one quantized layer; equal or not, never close."""

    name: str
    op_type: str
    attributes: dict[str, Any]
    quant_name: str
    quant_attributes: dict[str, Any]
    quant_output: str
    weight_dtype: str
    weight: list[Any]
    bias_dtype: str | None
    bias: list[int] | None
    dequant_name: str
    dequant_attributes: dict[str, Any]
    dequant_output: str
    param_name: str
    param_dtype: str
    param: list[int]


def quantized_layers(model: onnx.ModelProto) -> list[LayerView]:
    """Every layer between an AscendQuant and an AscendDequant, in the model's order.

    Names that AMCT takes from its own wrapper modules (weights, accumulators, float tensors) are
    left out; the name of a graph output reads ``<output>``.
    """
    arrays = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    made_by = {output: node for node in model.graph.node for output in node.output}
    outputs = {value.name for value in model.graph.output}
    views = []
    for dequant in model.graph.node:
        if dequant.op_type != "AscendDequant":
            continue
        node = made_by[dequant.input[0]]
        quant = made_by[node.input[0]]
        assert node.op_type in COMPUTE_OPS
        assert quant.op_type == "AscendQuant"
        weight = arrays[node.input[1]]
        bias = arrays[node.input[2]] if len(node.input) > 2 else None
        param = arrays[dequant.input[1]]
        result = dequant.output[0]
        views.append(
            LayerView(
                name=node.name,
                op_type=node.op_type,
                attributes=attributes_of(node),
                quant_name=quant.name,
                quant_attributes=attributes_of(quant),
                quant_output=quant.output[0],
                weight_dtype=str(weight.dtype),
                weight=weight.tolist(),
                bias_dtype=None if bias is None else str(bias.dtype),
                bias=None if bias is None else bias.tolist(),
                dequant_name=dequant.name,
                dequant_attributes=attributes_of(dequant),
                dequant_output="<output>" if result in outputs else result,
                param_name=dequant.input[1],
                param_dtype=str(param.dtype),
                param=param.tolist(),
            )
        )
    return views


def quantized_order(model: onnx.ModelProto) -> list[str]:
    """Names of the Ascend nodes and of the layers between them, in the model's order."""
    return [
        node.name
        for node in model.graph.node
        if not node.domain and (node.op_type.startswith("Ascend") or node.op_type in COMPUTE_OPS)
    ]


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    return {
        a.name: (onnx.AttributeProto.AttributeType.Name(a.type), _plain(a)) for a in node.attribute
    }


def _plain(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    return list(value) if isinstance(value, list | tuple) else value
