"""Operators between two grids: litert-torch's converter would pick one of them."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.convert.convert import convert
from lightning_qat.export.export import export
from lightning_qat.export.protocol import Artifact
from lightning_qat.export.verify import Agreement, verify
from lightning_qat.prepare.prepare import prepare
from lightning_qat_exporters import TFLiteExporter
from lightning_qat_exporters.tflite.flatbuffer.file import read
from tests.join_networks import train_steps

pytest.importorskip("litert_torch")
pytestmark = pytest.mark.xdist_group("tflite")

FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    # Decomposed to a selection, which has one grid in LiteRT; so it is float. 38 steps without.
    "softplus": (F.softplus, 1.0),
    # One grid in LiteRT: rounded on the input's, then requantized. 13 and 37 steps without.
    "bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), 2.0),
    # Spelled by operators that round once.
    "average with padding": (lambda x: F.avg_pool2d(x, 3, 1, 1), 1.0),
    "average to a size": (lambda x: F.adaptive_avg_pool2d(x, (4, 2)), 1.0),
    "hardsigmoid": (F.hardsigmoid, 1.0),
    # And twice at the border, where padding was counted.
    "average without padding": (
        lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
        2.0,
    ),
    # Read on a grid, and by a maximum in float. 73 steps without.
    "largest subtracted": (lambda x: x - x.amax(1, keepdim=True), 1.0),
    # litert-torch repeats pictures along another axis.
    "repeated": (lambda x: x.repeat(1, 1, 2, 1), 1.0),
    # A constant that would be multiplied into the weight before it.
    "scaled": (lambda x: x * 0.5 + 1, 1.0),
}


class Between(nn.Module):
    """A function between two convolutions."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.before, self.after = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.after(self.function(self.before(x)))
        return result


class Several(nn.Module):
    """Functions beside each other, each between convolutions of its own; an output of each."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Between(FUNCTIONS[name][0]) for name in names)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part(x) for part in self.parts)


ALONE = ("bilinear", "average without padding")
"""Those that are rounded twice: only one has the note, and the bounds are of a draw of weights."""
FILES = (*((name,) for name in ALONE), tuple(name for name in FUNCTIONS if name not in ALONE))
"""The functions of each file."""


@functools.cache
def compared(names: tuple[str, ...], folder: Path) -> tuple[Artifact, Agreement, dict[str, float]]:
    """A file of several functions, how it agrees, and how many steps each of them is off."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x, model = torch.randn(4, 3, 8, 8), Several(names)
        prepare(model, "int8", x)
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.02)
        for _ in range(3):
            optimizer.zero_grad()
            outputs = model(torch.randn_like(x))
            sum(F.mse_loss(y, torch.randn_like(y)) for y in outputs).backward()
            optimizer.step()
        quantized, exporter = convert(model.eval(), x), TFLiteExporter()
        artifact = export(quantized, exporter, folder / names[0])
        agreement = verify(quantized, artifact, torch.randn(16, 3, 8, 8), exporter)
    steps = {o.output: o.max_steps for o in agreement.runtimes[0].outputs}
    apart = {name: steps[o] for name, o in zip(names, quantized.output_names, strict=True)}
    return artifact, agreement, apart


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("requantize")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_tensor_keeps_the_grid_that_it_was_trained_with(name: str, folder: Path) -> None:
    (names,) = (names for names in FILES if name in names)
    artifact, agreement, apart = compared(names, folder)
    assert agreement.parameters_equal
    assert apart[name] <= FUNCTIONS[name][1] + 1e-5
    kinds = [op.kind for op in read(artifact.files["model"].read_bytes()).operators]
    assert "CEIL" not in kinds
    assert any("up to two steps" in note for note in artifact.notes) == (name == "bilinear")


def test_a_model_s_own_operator_is_not_taken_for_a_mark(tmp_path: Path) -> None:
    x, model = torch.randn(4, 3, 8, 8), Between(lambda x: F.softplus(torch.ceil(4 * x) / 4))
    prepare(model, "int8", x)
    artifact = export(convert(train_steps(model, x), x), TFLiteExporter(), tmp_path / "net")
    kinds = [op.kind for op in read(artifact.files["model"].read_bytes()).operators]
    assert kinds.count("CEIL") == 1
    assert "SIN" not in kinds


class Shared(nn.Module):
    """A pool, which litert-torch computes in NHWC, and a Linear read the same picture."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.avg_pool2d(x, 2), self.layer(x)


def test_readers_of_one_tensor_each_get_it_in_their_layout(tmp_path: Path) -> None:
    # 200 steps off when they shared a pair of quantize and dequantize.
    x, model = torch.randn(4, 4, 8, 8), Shared()
    prepare(model, "int8", x)
    with torch.no_grad():
        model.train()(x)
    quantized, exporter = convert(model.eval(), x), TFLiteExporter()
    artifact = export(quantized, exporter, tmp_path / "net")
    agreement = verify(quantized, artifact, torch.randn(16, 4, 8, 8), exporter)
    assert agreement.max_steps <= 1.001


@pytest.mark.parametrize("layer", [nn.Conv3d, nn.ConvTranspose3d])
def test_a_grid_between_two_layers_that_litert_has_in_float_only_is_kept(
    layer: type[nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    make: Callable[..., nn.Module] = layer
    net, x = (
        nn.Sequential(make(2, 4, 3), nn.ReLU(), make(4, 3, 1), make(3, 2, 1)),
        torch.randn(2, 2, 5, 5, 5),
    )
    prepare(net)
    model = convert(train_steps(net, x), x)
    exporter = TFLiteExporter(backend="litert")
    agreement = verify(model, export(model, exporter, tmp_path / "net"), (x,), exporter)
    assert agreement.parameters_equal, str(agreement)
    assert agreement.max_steps < 0.01
