"""A file with a dynamic batch is run with another number of samples than the first."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from lightning_qat.convert.convert import convert
from lightning_qat.export.other_batch import OtherBatch
from lightning_qat.export.protocol import Array, Artifact, as_arrays
from lightning_qat.export.verify import verify
from lightning_qat.ir.quantized_model import QuantizedModel
from tests.models import inputs_for, linear, trained


class Baked:
    """A target whose files take four samples only."""

    name = "baked"
    runtimes = ("toy",)

    def __init__(self, model: QuantizedModel) -> None:
        self.model = model

    def check_available(self) -> None: ...

    def export(self, model: QuantizedModel, path_prefix: Path) -> Artifact:
        return Artifact(self.name, {})

    def run(
        self, artifact: Artifact, runtime: str, inputs: Mapping[str, Array]
    ) -> dict[str, Array]:
        (x,) = inputs.values()
        return as_arrays(self.model.flat_outputs(self.model(torch.from_numpy(x).view(4, -1))))


@pytest.fixture(scope="module")
def converted() -> QuantizedModel:
    torch.manual_seed(0)
    return convert(trained(linear(), inputs_for("linear")), inputs_for("linear"))


def test_one_sample_is_the_other_batch(converted: QuantizedModel) -> None:
    x = inputs_for("linear")
    other = OtherBatch.of(converted, (x,), {})
    assert other is not None
    (given,) = other.inputs.values()
    assert (other.samples, given.shape) == (1, (1, *x.shape[1:]))
    two = OtherBatch.of(converted, (x[:1],), {})
    assert two is not None
    assert two.samples == 2


def test_a_fixed_batch_has_no_other() -> None:
    x = inputs_for("linear")
    fixed = convert(trained(linear(), x), x, dynamic_batch=False)
    assert OtherBatch.of(fixed, (x,), {}) is None


def test_a_file_with_a_baked_batch_is_cautioned_of(converted: QuantizedModel) -> None:
    target = Baked(converted)
    agreement = verify(converted, target.export(converted, Path("x")), exporter=target)
    assert agreement.runtimes[0].max_steps == 0
    (caution,) = agreement.cautions
    assert (
        "with 1 instead of 4 samples toy fails: RuntimeError: " in caution
        or "ValueError" in caution
    )
    assert "Caution: The batch is dynamic" in str(agreement)
