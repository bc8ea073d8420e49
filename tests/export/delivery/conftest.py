"""One converted model, anew for each test from its file."""

from pathlib import Path

import pytest

from lightning_qat.convert.convert import convert
from lightning_qat.ir.quantized_model import QuantizedModel
from tests.models import inputs_for, linear, trained


@pytest.fixture(scope="package")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    x = inputs_for("linear")
    path = tmp_path_factory.mktemp("model") / "net.pt2"
    convert(trained(linear(), x), x).save(path)
    return path


@pytest.fixture
def model(model_file: Path) -> QuantizedModel:
    return QuantizedModel.load(model_file)
