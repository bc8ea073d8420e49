"""Networks as people write them through the tinynn backend: heads of detectors, shuffles, PReLU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.convert.convert import convert
from lightning_qat.export.export import export
from lightning_qat.export.protocol import UnsupportedByTarget
from lightning_qat.export.verify import Agreement, verify
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.recipe.recipe import Recipe
from lightning_qat_exporters import TFLiteExporter
from lightning_qat_exporters.tflite.flatbuffer.file import TFLiteFile
from lightning_qat_exporters.tflite.flatbuffer.file import read as read_file
from tests.exporters.tflite.limit_networks import TinyScores, ZerosAdded
from tests.exporters.tflite.tinynn_files import (
    PICTURE,
    needs_litert,
    needs_tinynn,
    quantized_model,
    samples,
    written,
)
from tests.models import trained

pytestmark = [needs_tinynn, needs_litert]


def exported(
    model: QuantizedModel, x: Tensor, folder: Path, **options: Any
) -> tuple[Agreement, TFLiteFile, tuple[str, ...]]:
    """The agreement of a file with its model, the file, and its notes."""
    exporter = TFLiteExporter(backend="tinynn", **options)
    artifact = export(model, exporter, folder / "net")
    file = read_file(artifact.files["model"].read_bytes())
    return verify(model, artifact, x, exporter), file, artifact.notes


class Detector(nn.Module):
    """SSD: classes and boxes of two levels, each as (batch, anchors, values), joined."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8))
        self.down = nn.Conv2d(8, 8, 3, 2, 1)
        self.classes = nn.ModuleList(nn.Conv2d(8, 2 * 3, 3, padding=1) for _ in range(2))
        self.boxes = nn.ModuleList(nn.Conv2d(8, 2 * 4, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        near = F.relu(self.stem(x))
        levels = [near, F.hardswish(self.down(near))]
        scores, boxes = [], []
        for level, of_class, of_box in zip(levels, self.classes, self.boxes, strict=True):
            found = of_class(level).permute(0, 2, 3, 1)
            scores.append(found.reshape(level.shape[0], -1, 3))
            places = of_box(level).permute(0, 2, 3, 1).contiguous()
            boxes.append(places.view(level.shape[0], -1, 4))
        return {"scores": torch.cat(scores, 1).softmax(-1), "boxes": torch.cat(boxes, 1)}


class Retina(nn.Module):
    """RetinaNet: the axes of anchors and values are parted before the permutation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.classes, self.boxes = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        level, outputs = F.leaky_relu(self.stem(x), 0.1), []
        for head, values in ((self.classes, 3), (self.boxes, 4)):
            y = head(level)
            batch, _, height, width = y.shape
            y = y.view(batch, -1, values, height, width).permute(0, 3, 4, 1, 2)
            outputs.append(y.reshape(batch, -1, values))
        return tuple(outputs)


class ShuffleBlock(nn.Module):
    """ShuffleNet V2: half of the channels pass by, then both halves are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.branch = nn.Sequential(
            *(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
            *(nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(4)),
            *(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        )
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, 1)
        y = torch.cat((left, self.branch(right)), 1)
        batch, channels, height, width = y.shape
        y = y.reshape(batch, 2, channels // 2, height, width).transpose(1, 2)
        result: Tensor = self.fc(y.reshape(batch, channels, height, width).mean((2, 3)))
        return result


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "detector": Detector,
    "retina": Retina,
    "shuffle": ShuffleBlock,
}


@pytest.mark.parametrize("io", ["float", "int8"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_with_heads_is_integer_and_a_step_from_torch(
    name: str, io: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    model = convert(trained(NETWORKS[name](), x), x)
    agreement, file, notes = exported(model, x, tmp_path, io=io)
    assert not file.float_operators
    assert notes == ()
    assert agreement.parameter_differences == ()
    assert agreement.max_steps <= 1.001
    assert all(runtime.max_steps <= 2.001 for runtime in agreement.runtimes)


@pytest.mark.parametrize(("slopes", "kind"), [(1, "LEAKY_RELU"), (4, "PRELU")])
def test_a_prelu_is_integer_where_it_has_one_slope(slopes: int, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(slopes), nn.Conv2d(4, 2, 1))
    x = torch.randn(4, 3, 6, 6)
    model = convert(trained(net, x), x)
    agreement, file, _ = exported(model, x, tmp_path)
    types = {op.kind: file.tensors[op.outputs[0]].type for op in file.operators}
    assert types[kind] == ("INT8" if slopes == 1 else "FLOAT32")
    assert agreement.parameter_differences == ()
    # The step that a convolution is off may move the rounding behind it.
    assert agreement.max_steps <= 2.001


# Limits of kernels


def test_a_softmax_whose_kernel_would_abort_is_float_and_says_why(tmp_path: Path) -> None:
    x = torch.randn(4, 8)
    torch.manual_seed(0)
    agreement, file, notes = exported(quantized_model(TinyScores(), x), x, tmp_path)
    assert [op.kind for op in file.float_operators] == ["SOFTMAX"]
    assert "LiteRT's integer kernel would end the process" in notes[0]
    assert agreement.max_steps <= 1.001


def test_zeros_for_every_sample_are_a_constant_and_a_sum_of_other_scale_is_float(
    tmp_path: Path,
) -> None:
    x = torch.randn(4, 8)
    torch.manual_seed(0)
    agreement, file, _ = exported(quantized_model(ZerosAdded(), x), x, tmp_path)
    assert [op.kind for op in file.float_operators] == ["ADD"]
    assert agreement.max_steps <= 1.001


# One sample


class Squeezes(nn.Module):
    """``squeeze()`` names no axes: of one sample it would take the batch away too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(4, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(self.conv(x).mean((2, 3), keepdim=True).squeeze())
        return result


def test_squeeze_without_axes_keeps_the_batch_of_one_sample(tmp_path: Path) -> None:
    x = torch.randn(4, *PICTURE)
    torch.manual_seed(0)
    # Output shapes are compared too.
    agreement, _, _ = exported(quantized_model(Squeezes(), x), x, tmp_path)
    assert agreement.max_steps <= 1.001


# What keeps a layer from its int8 kernel


class Behind(nn.Module):
    """A layer, and what reads its output."""

    def __init__(self, read: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.read = nn.Conv2d(4, 4, 1), read

    def forward(self, x: Tensor) -> Any:
        return self.read(self.conv(x))


NEEDS = "an int8 kernel needs the scale of its output, which is not quantized; "
PREPARE = 'Prepare with Recipe(joins=True, outputs=True). Export with backend="litert"'
LITERT = 'Export with backend="litert"'

CAUSES: dict[str, tuple[Callable[[Tensor], Any], Recipe, str, str]] = {
    "no form": (
        lambda y: torch.erf(y.permute(0, 2, 3, 1).flatten(1)),
        Recipe(),
        "erf, which has no form here, reads it",
        LITERT,
    ),
    "float": (lambda y: y + 1, Recipe(), "add reads it in float", LITERT),
    "no joins": (
        lambda y: (F.hardswish(y), y),
        Recipe(joins=False, outputs=False),
        "hardswish reads it in float; it is an output of the model",
        PREPARE,
    ),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_what_reads_a_result_in_float_is_named(cause: str) -> None:
    read, recipe, reason, remedy = CAUSES[cause]
    (x,) = samples((PICTURE,), 4)
    with pytest.raises(UnsupportedByTarget) as caught:
        written(quantized_model(Behind(read), x, recipe))
    problem = caught.value.problems[0]
    assert (problem.layer, problem.reason, problem.remedy) == (
        "conv (conv2d)",
        NEEDS + reason,
        remedy,
    )


def test_an_operator_that_one_set_of_kernels_lacks_costs_their_comparison_alone(
    tmp_path: Path,
) -> None:
    # LiteRT's reference kernels have no ELU.
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ELU()), torch.randn(2, 3, 6, 6)
    model, exporter = convert(trained(net, x), x), TFLiteExporter(backend="tinynn")
    agreement = verify(model, export(model, exporter, tmp_path / "net"), (x,), exporter)
    assert [runtime.runtime for runtime in agreement.runtimes] == [
        "LiteRT, XNNPACK",
        "LiteRT, builtin kernels",
    ]
    (caution,) = (text for text in agreement.cautions if "ELU" in text)
    assert "LiteRT, reference kernels" in caution
    assert agreement.max_steps <= 1
