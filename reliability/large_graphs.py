"""Seconds and memory of ``lightning-qat convert`` and ``lint`` for graphs of up to 100,000 nodes.

    python -m reliability.large_graphs [--nodes 2000 10000 100000] [GRAPH ...]

Seconds are of the processor, since others may compute as well; each graph has a process of its own.
Both should grow as the nodes do.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper


class Graph:
    """A graph that grows: activations ``[4, 4]``, weights ``[4, 4]`` of int8, one grid for all."""

    def __init__(self, shape: Sequence[int] = (4, 4)) -> None:
        self._shape = list(shape)
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, NDArray[np.generic]] = {
            "scale": np.array(0.05, np.float32),
            "zero": np.array(3, np.int8),
            "weight_scale": np.array(0.01, np.float32),
            "weight_zero": np.array(0, np.int8),
        }

    def __len__(self) -> int:
        return len(self.nodes)

    def add(self, op_type: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Add a node of one output; the output's name."""
        output = f"{op_type.lower()}_{len(self.nodes)}"
        node = helper.make_node(op_type, inputs, [output], name=name or output, **attributes)
        self.nodes.append(node)
        return output

    def stored(self, *shape: int) -> str:
        """Add an initializer of int8 that no other has; its name."""
        name = f"weight_{len(self.constants)}"
        values = np.random.default_rng(len(self.constants)).integers(-127, 128, shape)
        self.constants[name] = values.astype(np.int8)
        return name

    def pair(self, x: str) -> str:
        """Quantize and dequantize."""
        integers = self.add("QuantizeLinear", x, "scale", "zero")
        return self.add("DequantizeLinear", integers, "scale", "zero")

    def weight(self, *shape: int) -> str:
        """A quantized weight."""
        return self.add(
            "DequantizeLinear", self.stored(*(shape or (4, 4))), "weight_scale", "weight_zero"
        )

    def sum(self, terms: Sequence[str]) -> str:
        """A tree of Adds, for one operator of so many inputs is nothing that a tool writes."""
        while len(terms) > 1:
            pairs = [self.add("Add", *terms[i : i + 2]) for i in range(0, len(terms) - 1, 2)]
            terms = [*pairs, *terms[len(terms) - len(terms) % 2 :]]
        return terms[0]

    def model(self, output: str) -> onnx.ModelProto:
        """The model that returns a tensor."""
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self._shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, self._shape)],
            [numpy_helper.from_array(np.asarray(a), name) for name, a in self.constants.items()],
        )
        opset = helper.make_opsetid("", 13)
        return helper.make_model(graph, opset_imports=[opset], ir_version=8)


def matmuls(nodes: int) -> onnx.ModelProto:
    """A chain of quantized MatMuls, four nodes each."""
    graph, x = Graph(), "x"
    while len(graph) < nodes:
        x = graph.add("MatMul", graph.pair(x), graph.weight())
    return graph.model(x)


def float_weights(nodes: int) -> onnx.ModelProto:
    """The same with weights that are quantized in the graph, as of a model in training."""
    graph, x = Graph(), "x"
    while len(graph) < nodes:
        name = f"float_{len(graph)}"
        graph.constants[name] = np.full((4, 4), 0.01 * (len(graph) % 100), np.float32)
        integers = graph.add("QuantizeLinear", name, "weight_scale", "weight_zero")
        weight = graph.add("DequantizeLinear", integers, "weight_scale", "weight_zero")
        x = graph.add("MatMul", graph.pair(x), weight)
    return graph.model(x)


def equal_names(nodes: int) -> onnx.ModelProto:
    """A chain of MatMuls that are all called the same."""
    graph, x = Graph(), "x"
    while len(graph) < nodes:
        x = graph.add("MatMul", graph.pair(x), graph.weight(), name="layer")
    return graph.model(x)


def fan_out(nodes: int) -> onnx.ModelProto:
    """One quantized tensor that a third of all nodes read."""
    graph, terms = Graph(), list[str]()
    data = graph.pair("x")
    while len(graph) < nodes * 2 // 3:
        terms.append(graph.add("MatMul", data, graph.weight()))
    return graph.model(graph.sum(terms))


def pair_per_reader(nodes: int) -> onnx.ModelProto:
    """One tensor that is quantized for each of its readers."""
    graph, terms = Graph(), list[str]()
    while len(graph) < nodes * 4 // 5:
        terms.append(graph.add("MatMul", graph.pair("x"), graph.weight()))
    return graph.model(graph.sum(terms))


def convolutions(nodes: int) -> onnx.ModelProto:
    """Convolutions, each with a batch norm to fold and a relu."""
    shape = (1, 4, 4, 4)
    graph, x = Graph(shape), "x"
    ones = np.ones(4, np.float32)
    graph.constants |= {"gamma": ones, "beta": ones, "mean": ones, "var": ones}
    while len(graph) < nodes:
        conv = graph.add("Conv", graph.pair(x), graph.weight(4, 4, 1, 1))
        norm = graph.add("BatchNormalization", conv, "gamma", "beta", "mean", "var")
        x = graph.add("Relu", norm)
    return graph.model(x)


def moved(nodes: int) -> onnx.ModelProto:
    """One pair, then Transposes, and a layer that reads the first pair's values through them."""
    graph = Graph()
    x = graph.pair("x")
    while len(graph) < nodes - 2:
        x = graph.add("Transpose", x, perm=[1, 0])
    return graph.model(graph.add("MatMul", x, graph.weight()))


def moved_integers(nodes: int) -> onnx.ModelProto:
    """Transposes of integers, between QuantizeLinear and DequantizeLinear."""
    graph = Graph()
    x = graph.add("QuantizeLinear", "x", "scale", "zero")
    while len(graph) < nodes - 3:
        x = graph.add("Transpose", x, perm=[1, 0])
    data = graph.add("DequantizeLinear", x, "scale", "zero")
    return graph.model(graph.add("MatMul", data, graph.weight()))


def readers_of_moves(nodes: int) -> onnx.ModelProto:
    """A chain of Transposes, and many readers of its end."""
    graph = Graph()
    x = graph.pair("x")
    while len(graph) < nodes // 2:
        x = graph.add("Transpose", x, perm=[1, 0])
    readers = [graph.add("Sigmoid", x) for _ in range(nodes // 4)]
    return graph.model(graph.add("MatMul", graph.pair(graph.sum(readers)), graph.weight()))


def diamonds_of_integers(nodes: int) -> onnx.ModelProto:
    """Integers that are doubled and cut in half, again and again: 2**n ways lead back."""
    graph = Graph()
    graph.constants |= {"begin": np.array([0]), "end": np.array([4])}
    x = graph.add("QuantizeLinear", "x", "scale", "zero")
    while len(graph) < nodes - 3:
        doubled = graph.add("Concat", x, x, axis=0)
        x = graph.add("Slice", doubled, "begin", "end")
    data = graph.add("DequantizeLinear", x, "scale", "zero")
    return graph.model(graph.add("MatMul", data, graph.weight()))


def joins(nodes: int) -> onnx.ModelProto:
    """Residual sums of quantized tensors."""
    graph, x = Graph(), "x"
    while len(graph) < nodes:
        data = graph.pair(x)
        x = graph.add("Add", data, graph.add("Relu", data))
    return graph.model(x)


def constants(nodes: int) -> onnx.ModelProto:
    """A chain of computed constants, each of which the model reads."""
    graph = Graph()
    x, constant = graph.pair("x"), "factor"
    graph.constants[constant] = np.ones((4, 4), np.float32)
    while len(graph) < nodes:
        constant = graph.add("Neg", constant)
        x = graph.add("Add", x, constant)
    return graph.model(x)


def float_operators(nodes: int) -> onnx.ModelProto:
    """One quantized layer behind float operators."""
    graph = Graph()
    x = graph.pair("x")
    while len(graph) < nodes - 2:
        x = graph.add("Sigmoid", x)
    return graph.model(graph.add("MatMul", graph.pair(x), graph.weight()))


GRAPHS: Mapping[str, Callable[[int], onnx.ModelProto]] = {
    graph.__name__: graph
    for graph in (
        *(matmuls, float_weights, equal_names, fan_out, pair_per_reader, convolutions, moved),
        *(moved_integers, readers_of_moves, diamonds_of_integers, joins, constants),
        float_operators,
    )
}
"""What the command measures, by name."""


class Cost(NamedTuple):
    """What one graph took: processor seconds, and megabytes at the most."""

    nodes: int
    convert: float
    lint: float
    memory: float


def cost_of(name: str, nodes: int) -> Cost:
    """Convert a graph and lint the result; to be run in a fresh process."""
    from lightning_qat import convert_qat_model
    from lightning_qat_exporters import CannExporter

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        model = GRAPHS[name](nodes)
        onnx.save(model, path)
        actual = len(model.graph.node)
        del model
        begin = time.process_time()
        files = convert_qat_model(path, path.with_name("converted")).files
        converted = time.process_time()
        CannExporter().lint(files["model"])
        return Cost(actual, converted - begin, time.process_time() - converted, _peak())


def _peak() -> float:
    (line,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) / 1024


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("graphs", nargs="*", metavar="GRAPH", help=", ".join(GRAPHS))
    parser.add_argument("--nodes", type=int, nargs="+", default=[2000, 10000, 100000])
    arguments = parser.parse_args()
    unknown = set(arguments.graphs) - set(GRAPHS)
    if unknown:
        parser.error(
            f"no such graph: {', '.join(sorted(unknown))}; choose from {', '.join(GRAPHS)}"
        )
    print("| graph | nodes | convert, s | ms per node | lint, s | peak, MB |")
    print("|---|--:|--:|--:|--:|--:|")
    for name in arguments.graphs or GRAPHS:
        for nodes in arguments.nodes:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                cost = fresh.submit(cost_of, name, nodes).result()
            print(
                f"| {name} | {cost.nodes} | {cost.convert:.1f} | "
                f"{1000 * cost.convert / cost.nodes:.2f} | {cost.lint:.1f} | {cost.memory:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
