"""Outputs that are not wanted and inputs that nothing needs stay out of a converted model."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.convert.convert import convert
from lightning_qat.convert.needed_inputs import needed_for_a_number
from lightning_qat.ir.quantized_model import QuantizedModel
from tests.models import trained

X, LABELS, MASK = torch.randn(4, 3), torch.tensor([0, 1, 1, 0]), torch.ones(4, 1)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor, labels: Tensor, mask: Tensor) -> dict[str, Any]:
        logits = self.head(x) * mask
        return {
            "loss": F.cross_entropy(logits, labels),
            "logits": logits,
            "aux": (logits + 1, logits.argmax(-1)),
        }


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return trained(Classifier(), (X, LABELS, MASK))


def test_without_a_choice_all_is_kept(model: nn.Module) -> None:
    whole = convert(model, (X, LABELS, MASK))
    assert whole.input_names == ("x", "labels", "mask")
    assert whole.output_names == ("loss", "logits", "aux_0", "aux_1")
    assert needed_for_a_number(whole.program) == {0: ("labels",)}


@pytest.mark.parametrize(
    ("wanted", "names"),
    [(["logits"], ("logits",)), (["aux"], ("aux_0", "aux_1")), (["aux_1"], ("aux_1",))],
)
def test_chosen_outputs_and_what_they_need_are_kept(
    model: nn.Module, wanted: list[str], names: tuple[str, ...]
) -> None:
    part = convert(model, (X, LABELS, MASK), export_outputs=wanted)
    assert (part.input_names, part.output_names) == (("x", "mask"), names)
    assert needed_for_a_number(part.program) == {}


def test_a_part_computes_what_the_whole_does(model: nn.Module, tmp_path: Path) -> None:
    whole = convert(model, (X, LABELS, MASK))
    convert(model, (X, LABELS, MASK), export_outputs=["logits"]).save(tmp_path / "part.pt2")
    part = QuantizedModel.load(tmp_path / "part.pt2")
    expected = whole(X[:3], LABELS[:3], MASK[:3])["logits"]
    for labels in (LABELS[:3], None):
        outputs = part(X[:3], labels, MASK[:3])
        assert torch.equal(outputs["logits"], expected)
        assert outputs["loss"] is None
        assert part.flat_inputs((X[:3], labels, MASK[:3]), {}).keys() == {"x", "mask"}
    # The sizes of what is left are still checked.
    with pytest.raises(ValueError, match="Inputs must have the sizes"):
        part(X[:3], None, MASK[:2])


def test_the_same_by_keyword_whatever_is_left_away(model: nn.Module) -> None:
    example = {"x": X, "labels": LABELS, "mask": MASK}
    part = convert(model, example, export_outputs=["logits"])
    assert part.input_names == ("x", "mask")
    first, second = part(mask=MASK, x=X), part(x=X, labels=LABELS, mask=MASK)
    assert torch.equal(first["logits"], second["logits"])


class Ignores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits: Tensor = self.head(batch["x"])
        return logits, F.cross_entropy(logits, batch["labels"])


def test_inputs_inside_a_mapping_are_left_out_too() -> None:
    example = ({"x": X, "labels": LABELS},)
    model = trained(Ignores(), example)
    part = convert(model, example, export_outputs=["output_0"])
    assert (part.input_names, part.output_names) == (("batch_x",), ("output_0",))
    logits, loss = part({"x": X[:2], "labels": LABELS[:2]})
    assert (logits.shape, loss) == ((2, 2), None)


def test_an_input_that_nothing_needs_is_left_out_without_a_choice() -> None:

    net = nn.ModuleDict({"head": nn.Linear(3, 2)})
    net.forward = lambda x, index: net["head"](x)  # type: ignore[method-assign]
    model = convert(trained(net, (X, LABELS)), (X, LABELS))
    assert model.input_names == ("x",)


def test_an_unknown_output_is_refused_with_the_closest_names(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"got 'logit', closest names: 'logits'"):
        convert(model, (X, LABELS, MASK), export_outputs=["logit"])
    with pytest.raises(ValueError, match="must name an output; got none of"):
        convert(model, (X, LABELS, MASK), export_outputs=[])
