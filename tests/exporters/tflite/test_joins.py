"""LiteRT computes convolutional networks in integers, from the first layer to the last."""

import functools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_qat.convert.convert import convert
from lightning_qat.export.export import export
from lightning_qat.export.protocol import Artifact, as_arrays
from lightning_qat.export.verify import verify
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.prepare.prepare import prepare
from lightning_qat.recipe.recipe import Recipe
from lightning_qat_exporters import TFLiteExporter
from lightning_qat_exporters.tflite.flatbuffer.file import read
from tests.exporters.tflite.litert_operators import assert_as_defined
from tests.join_networks import CNNS, NETWORKS, inputs_for, train_steps

pytest.importorskip("litert_torch")
# One worker pays for the import and shares the files.
pytestmark = pytest.mark.xdist_group("tflite")

EXPECTED = {
    "resnet8": {"CONV_2D": 8, "ADD": 3, "PAD": 1, "MEAN": 1, "FULLY_CONNECTED": 1},
    "mobilenet_v2": {
        **{"CONV_2D": 8, "DEPTHWISE_CONV_2D": 3, "ADD": 2, "PAD": 2, "MEAN": 1},
        "FULLY_CONNECTED": 1,
    },
    "mobilenet_v3_block": {
        **{"CONV_2D": 4, "DEPTHWISE_CONV_2D": 1, "HARD_SWISH": 2, "MEAN": 1, "RESHAPE": 2},
        # The gate: relu6(x + 3) / 6.
        **{"ADD": 2, "MUL": 2},
    },
    # An average on a grid of its own is a depthwise convolution, rounded once.
    "dense_block": {
        **{"CONV_2D": 4, "CONCATENATION": 2, "DEPTHWISE_CONV_2D": 1, "TRANSPOSE": 1, "MEAN": 1},
        "FULLY_CONNECTED": 1,
    },
    "unet": {**{"CONV_2D": 6, "CONCATENATION": 2, "MAX_POOL_2D": 2, "RESIZE_NEAREST_NEIGHBOR": 2}},
    "inception": {
        **{"CONV_2D": 6, "DEPTHWISE_CONV_2D": 1, "MUL": 1, "CONCATENATION": 1, "MEAN": 1},
        "FULLY_CONNECTED": 1,
    },
}
"""Every convolutional network's operators between the input and the output."""

RECIPES = {
    "every tensor": Recipe(),
    "inputs of layers only": Recipe(joins=False, outputs=False),
}

PARTIAL = ("mobilenet_v3_block", "dense_block", "encoder_block")
"""Networks for the second recipe: gates, concatenations and attention between float and int."""

FILES = [
    *((network, "every tensor") for network in NETWORKS),
    *((network, "inputs of layers only") for network in PARTIAL),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tflite")


@functools.cache
def converted(network: str, recipe: str) -> QuantizedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = inputs_for(network)
        model = NETWORKS[network][0]()
        prepare(model, RECIPES[recipe], x)
        return convert(train_steps(model, x), x)


@functools.cache
def exported(network: str, recipe: str, folder: Path) -> Artifact:
    return TFLiteExporter().export(converted(network, recipe), folder / f"{network}_{recipe}")


@pytest.mark.parametrize(("network", "recipe"), FILES)
def test_integers_scales_and_biases_are_the_model_s_to_the_bit(
    network: str, recipe: str, folder: Path
) -> None:
    model, artifact = converted(network, recipe), exported(network, recipe, folder)
    assert TFLiteExporter().differences(model, artifact) == ()


@pytest.mark.parametrize("network", CNNS)
def test_every_operator_that_computes_is_an_integer_one(network: str, folder: Path) -> None:
    artifact = exported(network, "every tensor", folder)
    file = read(artifact.files["model"].read_bytes())
    assert file.float_operators == ()
    found = Counter(op.kind for op in file.operators)
    assert found.pop("DEQUANTIZE") == 1
    assert file.operators[0].kind == "QUANTIZE"
    assert found.pop("QUANTIZE") == 1
    assert found == EXPECTED[network]
    assert artifact.notes == ()


@pytest.mark.parametrize(("network", "recipe"), FILES)
def test_the_outputs_are_torch_s(network: str, recipe: str, folder: Path) -> None:
    torch.manual_seed(0)
    model, x = converted(network, recipe), inputs_for(network, 32)
    exporter, artifact = TFLiteExporter(), exported(network, recipe, folder)
    expected = as_arrays(model.flat_outputs(model(x)))["output"]
    step = model.output_steps.get("output", float(np.ptp(expected)) / 255)
    for runtime in exporter.runtimes:
        found = exporter.run(artifact, runtime, as_arrays(model.flat_inputs((x,), {})))["output"]
        unfusable = np.abs(found - expected) / step
        assert np.mean(unfusable <= 3.001) >= 0.99
        # The networks have hardly been trained: their largest logits are a step apart.
        least = 0.9 if "XNNPACK" in runtime else 0.75
        assert np.mean(found.argmax(-1) == expected.argmax(-1)) >= least


@pytest.mark.parametrize("network", CNNS)
def test_every_operator_computes_what_its_definition_says_of_its_own_inputs(
    network: str, folder: Path
) -> None:
    content = exported(network, "every tensor", folder).files["model"].read_bytes()
    assert_as_defined(content, inputs_for(network, 8))


@pytest.mark.parametrize("network", NETWORKS)
def test_the_most_literal_runtime_is_named_first(network: str, folder: Path) -> None:
    model, x = converted(network, "every tensor"), inputs_for(network, 32)
    agreement = verify(model, exported(network, "every tensor", folder), x, TFLiteExporter())
    first, *others = (r.outputs[0].fraction_differing for r in agreement.runtimes)
    assert first <= max(others) + 0.05


def test_float_layers_are_named_with_the_reason(folder: Path) -> None:
    notes = exported("dense_block", "inputs of layers only", folder).notes
    assert (
        "fc: computed in float on its integer weight, because its output is not quantized. A "
        "recipe with joins=True and outputs=True quantizes it." in notes
    )


def test_a_constant_operand_is_one_of_the_files_integers(tmp_path: Path) -> None:
    class Offset(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)
            self.register_buffer("offset", torch.randn(1, 4, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.conv(x) + self.offset)

    x = torch.randn(4, 3, 6, 6)
    model = Offset()
    prepare(model, "int8", x)
    model.train()(x)
    quantized = convert(model.eval(), x)
    artifact = export(quantized, "tflite", tmp_path / "net")
    file = read(artifact.files["model"].read_bytes())
    assert not file.float_operators
    assert artifact.differences == ()
