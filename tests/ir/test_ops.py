"""Reading and adding the two operators of a converted model."""

import torch
from torch import fx, nn

from lightning_qat.convert.convert import convert
from lightning_qat.ir.ops import (
    as_dequantize,
    as_fake_quantize,
    key_of,
    make_dequantize,
    make_fake_quantize,
)
from lightning_qat.numerics.qparams import IntegerGrid, QParams
from tests.models import trained

ACTIVATION = QParams(torch.tensor(0.5), torch.tensor(3, dtype=torch.int32), IntegerGrid.signed(8))
WEIGHT = QParams(
    torch.tensor([0.5, 2.0]), torch.zeros(2, dtype=torch.int32), IntegerGrid.weight(8), 0
)
INTEGERS = torch.tensor([[1, -2], [3, 127]], dtype=torch.int8)


def one_node_graph() -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(4)
    graph.output(x)
    return fx.GraphModule(nn.Module(), graph)


def test_nodes_that_are_made_are_whole_and_run() -> None:
    module = one_node_graph()
    x, output = module.graph.nodes
    with module.graph.inserting_before(output):
        quantized = make_fake_quantize(module.graph, x, ACTIVATION, "net.0.input")
        # A second node of that key gets buffers of its own.
        make_fake_quantize(module.graph, x, ACTIVATION, "net.0.input")
        weight = make_dequantize(module.graph, INTEGERS, WEIGHT, "net.0.weight")
    output.args = ((quantized, weight),)
    module.recompile()
    found = module(torch.tensor([0.6, -100.0, 100.0]))
    # Zero point 3: integers -128 .. 127 stand for -65.5 .. 62.
    assert found[0].tolist() == [0.5, -65.5, 62.0]
    assert found[1].tolist() == [[0.5, -1.0], [6.0, 254.0]]
    assert quantized.meta["val"] is x.meta["val"]
    assert (weight.meta["val"].shape, weight.meta["val"].dtype) == ((2, 2), torch.float32)


def test_what_was_made_is_what_is_read() -> None:
    module = one_node_graph()
    x, output = module.graph.nodes
    with module.graph.inserting_before(output):
        quantized = make_fake_quantize(module.graph, x, ACTIVATION, "input")
        weight = make_dequantize(module.graph, INTEGERS, WEIGHT, "weight")
    activation, dequantize = as_fake_quantize(quantized), as_dequantize(weight)
    assert activation is not None
    assert dequantize is not None
    assert (activation.x, activation.grid, activation.key) == (x, ACTIVATION.grid, "input")
    assert (dequantize.grid, dequantize.axis, dequantize.key) == (WEIGHT.grid, 0, "weight")
    assert (quantized.args, weight.args) == (activation.args, dequantize.args)
    assert (as_dequantize(quantized), as_fake_quantize(weight)) == (None, None)
    assert [key_of(node) for node in (quantized, weight, x, None)] == [
        "input",
        "weight",
        None,
        None,
    ]


def test_every_key_of_a_converted_model_is_that_of_a_node() -> None:
    x = torch.randn(2, 3)
    model = convert(trained(nn.Sequential(nn.Linear(3, 3)), x), x)
    keys = [key for node in model.program.graph.nodes if (key := key_of(node)) is not None]
    assert list(dict.fromkeys(keys)) == list(model.tensors)
