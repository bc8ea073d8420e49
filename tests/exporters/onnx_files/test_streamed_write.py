"""Files written tensor by tensor are what protobuf would write, in less memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from lightning_qat_exporters.onnx_files.streamed_write import STREAMED_BYTES, write_streamed
from lightning_qat_exporters.onnx_files.write import save_onnx

LARGE = 5 * STREAMED_BYTES


def model_with(*tensors: ir.TensorProtocol) -> ir.Model:
    values = [
        ir.Value(
            name=f"w{i}",
            type=ir.TensorType(t.dtype),
            shape=ir.Shape(t.shape.numpy()),
            const_value=t,
        )
        for i, t in enumerate(tensors)
    ]
    nodes = [ir.node("Identity", [value]) for value in values]
    for i, node in enumerate(nodes):
        node.outputs[0].name = f"y{i}"
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph(
        [], outputs, nodes=nodes, initializers=values, opset_imports={"": 21}, name="g"
    )
    return ir.Model(graph, ir_version=10, producer_name="test")


def lazy(array: Any) -> ir.LazyTensor:
    return ir.LazyTensor(
        lambda: ir.Tensor(array), dtype=ir.DataType.FLOAT, shape=ir.Shape(array.shape)
    )


@pytest.mark.parametrize("size", [0, 1, STREAMED_BYTES, LARGE])
def test_the_file_holds_the_message_that_protobuf_would_write(size: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    integers = generator.integers(-8, 8, (size, 2)).astype(np.int8)
    model = model_with(
        ir.Tensor(integers),
        ir.Tensor(integers.T),  # not contiguous
        lazy(integers.astype(np.float32)),
        ir.tensor(integers.astype(ml_dtypes.int4)),
        ir.StringTensor([b"a", b"b"], shape=ir.Shape([2])),
        ir.Tensor(np.array(3.0, np.float32)),
    )
    write_streamed(model, tmp_path / "m.onnx")
    assert onnx.load(tmp_path / "m.onnx") == ir.to_proto(model)
    assert isinstance(model.graph.initializers["w2"].const_value, ir.LazyTensor)


def test_external_data_becomes_part_of_the_file(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "w.bin").write_bytes(array.tobytes())
    external = ir.ExternalTensor(
        "w.bin",
        0,
        24,
        ir.DataType.FLOAT,
        shape=ir.Shape([6]),
        name="w0",
        base_dir=tmp_path / "source",
    )
    save_onnx(model_with(external), tmp_path / "m.onnx")
    (stored,) = onnx.load(tmp_path / "m.onnx", load_external_data=False).graph.initializer
    assert numpy_helper.to_array(stored).tolist() == array.tolist()


CONVERT = r"""
import re, sys
from pathlib import Path
from lightning_qat import convert_qat_model
# Not ru_maxrss: it begins at the size of the process that started this one.
status = Path("/proc/self/status")
peak = lambda: int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 1024
for name in ("small", "large"):
    before = peak()
    convert_qat_model(Path(sys.argv[1], f"{name}.onnx"), Path(sys.argv[1], "net"))
print(peak() - before)
"""


def chain(layers: int, channels: int) -> onnx.ModelProto:
    """Quantized matrix products of a megabyte each, stored as int8."""
    constants = {"s": np.float32(0.1), "z": np.int8(0)}
    nodes, x = [], "x"
    for n in range(layers):
        constants[f"w{n}"] = np.full((channels, channels), n, np.int8)
        nodes += [
            helper.make_node("DequantizeLinear", [f"w{n}", "s", "z"], [f"wd{n}"]),
            helper.make_node("QuantizeLinear", [x, "s", "z"], [f"q{n}"]),
            helper.make_node("DequantizeLinear", [f"q{n}", "s", "z"], [f"d{n}"]),
            helper.make_node("MatMul", [f"d{n}", f"wd{n}"], [f"y{n}"], name=f"fc{n}"),
        ]
        x = f"y{n}"
    ends = [helper.make_tensor_value_info(v, TensorProto.FLOAT, [1, channels]) for v in ("x", x)]
    weights = [numpy_helper.from_array(np.asarray(a), name) for name, a in constants.items()]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's table of a process's memory")
def test_a_conversion_takes_less_than_four_times_the_model_s_size(tmp_path: Path) -> None:
    onnx.save(chain(1, 8), tmp_path / "small.onnx")
    onnx.save(chain(32, 1024), tmp_path / "large.onnx")
    size = (tmp_path / "large.onnx").stat().st_size / 2**20
    arguments = [sys.executable, "-c", CONVERT, str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 4 * size


EXPORT = r"""
import gc, re, sys
from pathlib import Path
import torch
from torch import nn
from lightning_qat import QuantizedModel, Recipe, convert, export
from tests.models import trained
def model(layers, size):
    x, net = torch.randn(2, size), nn.Sequential(*(nn.Linear(size, size) for _ in range(layers)))
    return convert(trained(net, x, Recipe(joins=False, outputs=False)), x)
prefix, large = Path(sys.argv[1], "net"), model(8, 2048)
kilobytes = lambda key: int(re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text())[1])
for target in ("fake_quant_onnx", "cann"):
    export(model(1, 8), target, prefix)
    # Another object each time, of which nothing is remembered.
    once = QuantizedModel(large.program, large.input_names, large.output_names)
    # What was freed until now would be used again, and the peak would hide what is taken anew.
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    export(once, target, prefix)
    print((kilobytes("VmHWM") - before) / 1024)
    del once
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's table of a process's memory")
def test_an_export_takes_less_than_three_quarters_of_the_float_weights(tmp_path: Path) -> None:
    # Every large array is the system's own: it is not taken from what was freed before.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    arguments = [sys.executable, "-c", EXPORT, str(tmp_path)]
    done = subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=Path(__file__).parents[3],
    )
    # Both targets: fake_quant_onnx, then cann.
    first, second = map(float, done.stdout.split())
    assert first < 0.75 * 8 * 16
    assert second < 0.75 * 8 * 16
