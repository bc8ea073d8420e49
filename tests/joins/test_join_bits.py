"""``Recipe.join_bits``: what sums and norms read has more bits than what is multiplied."""

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat import ActivationSpec, Recipe, sensitivity
from lightning_qat.recipe.typed_dicts import LayerKeys
from tests.joins.cases import calibrated, serving, the_plan

FEW = ActivationSpec(bits=4)


class Block(nn.Module):
    """A transformer block with the norm in front, and attention written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        return x + self.proj(weights @ v)


class Residual(nn.Module):
    """ResNet's: the convolution and the shortcut read what relu gives."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = (nn.Conv1d(4, 4, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(self.conv(x) + x)


class AddsAndMultiplies(nn.Module):
    """A sum reads a tensor before a product does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        total = y + x
        return total.mean(-1, keepdim=True) + y @ x.transpose(-2, -1)


def bits(model: nn.Module) -> Mapping[str, int]:
    """Bits by consumer."""
    return {reader: t.spec.bits for t in the_plan(model).tensors for reader in t.consumers}


def test_sums_norms_and_softmax_have_join_bits_and_products_those_of_layers() -> None:
    model = calibrated(Block(), torch.randn(2, 5, 8), recipe=Recipe(activation=FEW, join_bits=8))
    assert bits(model) == {
        "norm.layer_norm:0[0]": 8,
        "add:0[0]": 8,
        "qkv": 4,
        "matmul:0[0]": 4,
        "matmul:0[1]": 4,
        "softmax:0[0]": 8,
        "matmul:1[0]": 4,
        "matmul:1[1]": 4,
        "proj": 4,
        "add:0[1]": 8,
        "output:0[0]": 4,
    }


def test_without_join_bits_all_have_those_of_layers() -> None:
    model = calibrated(Block(), torch.randn(2, 5, 8), recipe=Recipe(activation=FEW))
    assert set(bits(model).values()) == {4}


def test_a_tensor_that_a_layer_reads_as_well_is_quantized_once_with_the_layers_bits() -> None:
    model = calibrated(Residual(), torch.randn(2, 4, 6), recipe=Recipe(activation=FEW, join_bits=8))
    found = bits(model)
    assert (found["conv"], found["add:0[1]"], found["add:0[0]"]) == (4, 4, 8)
    assert serving(model, "", "add", 1) is model.get_submodule("conv.input_quantizer")


def test_a_tensor_that_a_product_reads_as_well_has_the_products_bits() -> None:
    model = calibrated(
        AddsAndMultiplies(), torch.randn(2, 3, 4), recipe=Recipe(activation=FEW, join_bits=8)
    )
    found = bits(model)
    assert (found["add:0[0]"], found["matmul:0[0]"], found["mean:0[0]"]) == (4, 4, 8)


def test_attention_of_torch_has_the_bits_of_a_product() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(self.q(x), self.k(x), x) + self.q(x)

    model = calibrated(Attends(), torch.randn(2, 5, 8), recipe=Recipe(activation=FEW, join_bits=8))
    found = bits(model)
    assert {found[f"scaled_dot_product_attention:0[{n}]"] for n in (0, 1, 4)} == {4}
    assert found["add:0[0]"] == 8


def test_a_name_in_the_overrides_wins() -> None:
    recipe = Recipe(activation=FEW, join_bits=8, overrides={"1": {"activation": {"bits": 5}}})
    model = calibrated(nn.Sequential(Block(), Block()), torch.randn(2, 5, 8), recipe=recipe)
    found = bits(model)
    assert (found["0.add:0[1]"], found["1.add:0[1]"], found["1.matmul:0[0]"]) == (8, 5, 5)


def test_more_bits_than_join_bits_stay() -> None:
    recipe = Recipe(activation=ActivationSpec(bits=16, symmetric=True), join_bits=8)
    assert recipe.for_call("", "Block", "join").bits == 16


def test_sensitivity_measures_each_tensor_at_its_bits() -> None:
    data = [torch.randn(4, 5, 8) for _ in range(2)]
    found = sensitivity(Block(), Recipe(activation=FEW, join_bits=8), data=data, progress=False)
    rows = {row.layer: row.input_bits for row in found.rows}
    assert {name: n for name, n in rows.items() if "add" in name or "norm" in name} == {
        "norm.layer_norm_0_0": 8,
        "add_0_1": 8,
    }
    assert rows["matmul_0_0"] == 4


def test_sensitivity_gives_a_call_its_bits_where_the_layer_that_shares_its_tensor_is_float() -> (
    None
):
    # conv and the sum read one tensor, of 2 bits. Without conv the sum reads it at 8.
    torch.manual_seed(0)
    data = [torch.randn(8, 4, 6) for _ in range(2)]
    fine: LayerKeys = {"activation": {"bits": 8}}
    recipe = Recipe(
        activation=ActivationSpec(bits=2),
        join_bits=8,
        outputs=False,
        overrides={"stem": fine, "head": fine},
    )
    found = sensitivity(Residual(), recipe, data=data, mode="all_but", progress=False)
    decibels = {row.layer: row.value for row in found.rows}
    assert decibels["conv"] > 30 > 15 > decibels["head"]


def test_sensitivity_gives_it_a_products_bits_where_one_reads_it_too() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            return (y + x).mean(-1, keepdim=True) + self.conv(y) + y @ x.transpose(-2, -1) @ y

    torch.manual_seed(0)
    data = [torch.randn(8, 4, 4) for _ in range(2)]
    recipe = Recipe(activation=ActivationSpec(bits=2), join_bits=8, outputs=False)
    found = sensitivity(Shared(), recipe, data=data, mode="all_but", progress=False)
    decibels = {row.layer: row.value for row in found.rows}
    # Only what the convolution alone costs is gone; the products stay at 2 bits.
    assert decibels["conv"] < 10


@pytest.mark.parametrize("wrong", [1, 9, True, "8"])
def test_they_are_2_to_8(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"Recipe.join_bits must be an int from 2 to 8, or null"):
        Recipe(join_bits=wrong)  # type: ignore[arg-type]
