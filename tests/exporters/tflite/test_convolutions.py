"""Convolutions of every kind in LiteRT, through both backends."""

from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_qat import convert, export, prepare, verify
from lightning_qat.export.protocol import Artifact, MissingDependency, UnsupportedByTarget
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat_exporters import TFLiteExporter
from lightning_qat_exporters.tflite.decompose.conv_transpose import dense, dense_like
from lightning_qat_exporters.tflite.flatbuffer.file import read
from tests.exporters.test_convolutions import CASES, converted

needs_litert = pytest.mark.skipif(
    find_spec("ai_edge_litert") is None, reason="running TFLite files needs ai-edge-litert"
)
# One worker pays for the import of a backend.
pytestmark = [pytest.mark.xdist_group("tflite"), needs_litert]

BACKENDS = ["litert", "tinynn"]

INTEGER = {
    "conv1d": "CONV_2D",
    "conv1d depthwise": "DEPTHWISE_CONV_2D",
    "conv_transpose1d": "TRANSPOSE_CONV",
    "conv_transpose2d": "TRANSPOSE_CONV",
    "conv_transpose2d without bias": "TRANSPOSE_CONV",
}
"""Case to the integer operator that it becomes."""

FLOAT = {"conv3d": "CONV_3D", "conv_transpose3d": "CONV_3D_TRANSPOSE"}
"""Case to the operator, of which LiteRT has no integer kernel."""


def exporter(backend: str) -> TFLiteExporter:
    made = TFLiteExporter(backend=backend)  # type: ignore[arg-type]
    try:
        made.check_available()
    except MissingDependency as error:
        pytest.skip(str(error))
    return made


def written(model: QuantizedModel, backend: str, folder: Path) -> tuple[Artifact, Counter[str]]:
    """The file, whose numbers are the model's and whose outputs a step away at most."""
    own = exporter(backend)
    artifact = export(model, own, folder / "net")
    args, kwargs = model.example_inputs
    many = [torch.randn(16, *x.shape[1:]) for x in args]
    agreement = verify(model, artifact, tuple(many), own)
    assert not kwargs
    assert agreement.parameter_differences == ()
    assert agreement.max_steps <= 1.001, agreement
    return artifact, Counter(op.kind for op in read(artifact.files["model"].read_bytes()).operators)


@pytest.mark.parametrize("name", INTEGER)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_is_computed_in_integers(backend: str, name: str, tmp_path: Path) -> None:
    exporter(backend)
    artifact, kinds = written(converted(*CASES[name]), backend, tmp_path)
    assert kinds[INTEGER[name]] == 1
    assert artifact.notes == ()


@pytest.mark.parametrize("name", FLOAT)
def test_a_layer_of_three_dimensions_is_float_on_integer_weights(name: str, tmp_path: Path) -> None:
    exporter("litert")
    artifact, kinds = written(converted(*CASES[name]), "litert", tmp_path)
    assert kinds[FLOAT[name]] == 1
    assert artifact.notes[0] == (
        "0: computed in float on its integer weight, because LiteRT has "
        f"{FLOAT[name]} in float only."
    )
    file = read(artifact.files["model"].read_bytes())
    assert file.tensors[[t.name for t in file.tensors].index("0.weight")].type == "INT8"


@pytest.mark.parametrize("name", FLOAT)
def test_tinynn_names_a_layer_of_three_dimensions(name: str, tmp_path: Path) -> None:
    exporter("tinynn")
    with pytest.raises(UnsupportedByTarget, match=r'0 \(conv.*3d\).*backend="litert"'):
        written(converted(*CASES[name]), "tinynn", tmp_path)


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_of_a_transposed_convolution_become_zeros(
    backend: str, granularity: str, tmp_path: Path
) -> None:
    exporter(backend)
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2, dilation=2)
    x, model = torch.randn(4, 4, 5, 5), nn.Sequential(layer)
    prepare(model, {"preset": "int8", "weight": {"granularity": granularity}}, x)
    model.train()(x)
    artifact, kinds = written(convert(model, x), backend, tmp_path)
    assert kinds["TRANSPOSE_CONV"] == 1
    file = read(artifact.files["model"].read_bytes())
    (weight,) = (t for t in file.tensors if t.name == "0.weight")
    assert weight.shape == (6, 5, 5, 4)
    assert weight.axis == 0
    assert weight.scale.size == (6 if granularity == "per_channel" else 1)


def test_a_weight_is_dense_with_zeros_between() -> None:
    integers = torch.arange(1, 9).reshape(2, 1, 4)
    whole = dense(integers, groups=2, dilation=[2])
    assert whole.tolist() == [
        [[1, 0, 2, 0, 3, 0, 4], [0] * 7],
        [[0] * 7, [5, 0, 6, 0, 7, 0, 8]],
    ]
    found = dense_like(integers, (2, 2, 7))
    assert found is not None
    assert torch.equal(found, whole)
    assert dense_like(integers, (2, 2, 6)) is None
