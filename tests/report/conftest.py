"""An export folder, and the converted model of it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from lightning_qat.convert.convert import convert
from lightning_qat.export.delivery.export_all import export_all
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.specs import WeightSpec
from lightning_qat_exporters import CannExporter, FakeQuantOnnxExporter
from tests.models import ResidualAdd, trained


class Exported(NamedTuple):
    """What an export leaves.

    Args:
        folder: With the model, its files and the manifest.
        model: The converted model.
    """

    folder: Path
    model: QuantizedModel


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A block with a shortcut, W4A8, for two targets. Tests must not change it."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    x = torch.randn(8, 4, 6, 6)
    recipe = Recipe(weight=WeightSpec(bits=4))
    model = convert(trained(ResidualAdd(), x, recipe), x, recipe=recipe)
    model.save(folder / "net.pt2")
    training = {
        "loss": [[1, 2.0], [2, 1.0], [3, 0.5]],
        "phases": [[0, "calibrate"], [1, "quantize"]],
        "weight_sqnr_db": {"conv1.weight": 20.25},
        "left_float": [["norm", "GroupNorm", "its class has no quantized form"]],
    }
    exporters = [FakeQuantOnnxExporter(), CannExporter()]
    export_all(model, exporters, folder, "net", training=training)
    return Exported(folder, model)
