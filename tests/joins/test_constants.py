"""Positions, frequencies, masks and norms written by hand: what is no activation stays exact."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat import convert, export, prepare, verify
from lightning_qat.joins.constants import ConstantTensors, Origin
from lightning_qat.recipe.recipe import Recipe
from tests.joins.cases import calibrated, serving, the_plan

# Positions and frequencies


class Rotary(nn.Module):
    """Angles of positions that forward is given, as Llama's."""

    inv_freq: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        powers = torch.arange(0, features, 2).float() / features
        self.register_buffer("inv_freq", 1.0 / 10000.0**powers, persistent=False)

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        frequencies = self.inv_freq[None, :, None].float()
        angles = (frequencies @ positions[:, None, :].float()).transpose(1, 2)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-second, first), dim=-1)


class RotatesQueries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.rope = nn.Linear(8, 8), Rotary(8)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q = self.q(x)
        cos, sin = self.rope(x, positions)
        return q * cos + rotate_half(q) * sin


def test_rotary_angles_of_1024_positions_are_exact() -> None:
    # An 8-bit grid from 0 to 1023 has steps of 4 rad.
    x, positions = torch.randn(1, 1024, 8), torch.arange(1024)[None]
    model = RotatesQueries()
    expected = model.rope(x, positions)
    calibrated(model, x, positions)
    found: list[tuple[Tensor, Tensor]] = []
    model.rope.register_forward_hook(lambda module, args, output: found.append(output))
    model(x, positions)
    assert all(map(torch.equal, found[0], expected))
    assert not [t for t in the_plan(model).tensors if "rope" in t.quantizer]
    assert not [call for call in the_plan(model).left_float if "rope" in call]


def test_the_products_of_a_rotation_have_cos_and_sin_on_a_grid_from_minus_one_to_one() -> None:
    x, positions = torch.randn(1, 1024, 8), torch.arange(1024)[None]
    model = calibrated(RotatesQueries(), x, positions)
    for call in (0, 1):
        quantizer = serving(model, "", "mul", 1, call)
        assert quantizer.max_val.item() == pytest.approx(1.0, abs=1e-3)
        assert quantizer.min_val.item() == pytest.approx(-1.0, abs=1e-3)


class Sinusoidal(nn.Module):
    """A table that forward computes, as the first transformer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(10, 8), nn.Linear(8, 8)

    def table(self, length: int) -> Tensor:
        positions = torch.arange(length).unsqueeze(1)
        frequencies = torch.exp(torch.arange(0, 8, 2) * (-9.2 / 8))
        table = torch.zeros(length, 8)
        table[:, 0::2] = torch.sin(positions * frequencies)
        table[:, 1::2] = torch.cos(positions * frequencies)
        return table

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.embed(ids) + self.table(ids.shape[1]))


def test_a_sinusoidal_table_is_computed_exactly_and_read_on_a_grid() -> None:
    plan = the_plan(calibrated(Sinusoidal(), torch.randint(10, (2, 64))))
    assert plan.left_float == ()
    joins = [c for t in plan.tensors for c in t.consumers if c.startswith(("add", "mul"))]
    assert joins == ["add:0[0]", "add:0[1]"]


class Grid(nn.Module):
    """Boxes of cells, as a detector decodes them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.head(x)
        rows, columns = (torch.arange(n, device=x.device).float() for n in y.shape[-2:])
        grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))
        anchors = (grid + 0.5) * 8.0 / 3.0
        return y.sigmoid() * 2, anchors


def test_coordinates_that_a_model_returns_are_exact() -> None:
    x = torch.randn(1, 3, 40, 40)
    model = Grid()
    expected = model(x)[1]
    calibrated(model, x)
    assert torch.equal(model(x)[1], expected)
    assert [c for c in the_plan(model).left_float if "mul" not in c] == []


# What depends on what


def test_noise_and_what_a_parameter_reaches_are_data() -> None:
    model = nn.BatchNorm1d(3)
    constants = ConstantTensors(model.modules())
    assert model.running_mean is not None
    ids, weight = torch.tensor([1, 2]), model.weight

    def origin(func: Callable[..., Tensor], *args: Any) -> Origin:
        inputs = constants.inputs(func, args, {})
        result = func(*args)
        constants.follow(func, args, {}, [result], inputs)
        assert constants.origin(result) is inputs
        return inputs

    assert origin(torch.arange, 3) is Origin.FIXED
    assert origin(torch.add, model.running_mean, torch.tensor(1e-5)) is Origin.FIXED
    assert origin(torch.mul, ids, 2) is Origin.INTEGERS
    assert origin(torch.randn, 3) is Origin.DATA
    assert origin(torch.randn_like, model.running_mean) is Origin.DATA
    assert origin(torch.zeros_like, torch.randn(3)) is Origin.FIXED
    assert origin(F.embedding, ids, weight[:, None]) is Origin.DATA
    x = torch.randn(3)
    assert origin(torch.gt, x, 0) is Origin.DATA
    table = torch.zeros(3)
    assert origin(Tensor.copy_, table, x) is Origin.DATA
    assert constants.origin(table) is Origin.DATA


# Norms written by hand


class LlamaNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + 1e-6)
        return self.weight * x.to(dtype)


class GemmaNorm(LlamaNorm):
    def forward(self, x: Tensor) -> Tensor:
        normed = x.float() * torch.pow(x.float().square().mean(-1, keepdim=True) + 1e-6, -0.5)
        return (normed * (1.0 + self.weight.float())).type_as(x)


class DebertaNorm(LlamaNorm):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-7)
        return self.weight * x + self.bias


class ChannelsFirstNorm(DebertaNorm):
    """ConvNeXt's, over the second axis."""

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + 1e-6)
        return self.weight[None, :, None] * x + self.bias[None, :, None]


class DeviationNorm(DebertaNorm):
    """That of the annotated transformer."""

    def forward(self, x: Tensor) -> Tensor:
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return self.weight * (x - mean) / (std + 1e-6) + self.bias


class SquaresNorm(DebertaNorm):
    def forward(self, x: Tensor) -> Tensor:
        variance = (x**2).mean(-1, keepdim=True) - x.mean(-1, keepdim=True) ** 2
        scale = 1.0 / (variance + 1e-6).sqrt()
        return (x - x.mean(-1, keepdim=True)) * scale * self.weight + self.bias


NORMS = (LlamaNorm, GemmaNorm, DebertaNorm, ChannelsFirstNorm, DeviationNorm, SquaresNorm)


class Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(8, 8), norm, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(x)
        return x + self.two(self.norm(x))


@pytest.mark.parametrize("kind", NORMS)
def test_of_a_norm_by_hand_only_the_input_is_quantized(kind: Callable[[], nn.Module]) -> None:
    norm = kind()
    model = calibrated(Normed(norm), torch.randn(2, 8, 8))
    plan = the_plan(model)
    assert plan.left_float == ()
    [shared] = [t for t in plan.tensors if any(c.startswith("norm.") for c in t.consumers)]
    # The residual reads the same integers.
    assert "add:1[0]" in shared.consumers
    x = torch.randn(2, 8, 8)
    reference = kind()
    reference.load_state_dict(
        {k: v for k, v in norm.state_dict().items() if k in reference.state_dict()}
    )
    seen: list[Tensor] = []
    norm.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    model(x)
    assert torch.equal(seen[1], reference(model.get_submodule(shared.quantizer)(seen[0])))


def test_a_gate_of_means_is_no_norm() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            return x * x.mean(-1, keepdim=True)

    plan = the_plan(calibrated(Gated(), torch.randn(4, 8)))
    assert "mul:0[1]" in [c for t in plan.tensors for c in t.consumers]


# Numbers, and what is named


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.eps = torch.tensor(1e-6)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.erf(self.fc(x)) + 1e-6
        return self.last(torch.erf(y + self.eps - 0.5))


def test_an_epsilon_is_no_join_and_equal_calls_are_counted() -> None:
    plan = the_plan(calibrated(Small(), torch.randn(4, 6)))
    assert plan.left_float == ("erf: no integer form is known (2 calls)",)


# Masks

LEAST = torch.finfo(torch.float32).min
GIVEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "integers": lambda s, m: s + (1.0 - m[:, None].to(s.dtype)) * -10000.0,
    "least number": lambda s, m: s + (1.0 - m[:, None].to(s.dtype)) * LEAST,
    "booleans": lambda s, m: s.masked_fill(m[:, None] == 0, -1e9),
    "float": lambda s, m: s + (1.0 - m.float()[:, None]) * -10000.0,
    "where": lambda s, m: torch.where(m[:, None] > 0, s, torch.full([], LEAST)),
    "filled": lambda s, m: s + torch.zeros_like(s).masked_fill(m[:, None] == 0, -1e30),
    "small": lambda s, m: s + (m[:, None] == 0) * -100.0,
}


class Masked(nn.Module):
    def __init__(self, mask: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.mask = nn.Linear(8, 24), mask

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.softmax(self.mask(q @ k.transpose(-2, -1) / 8**0.5, mask), -1) @ v


@pytest.mark.parametrize("as_float", [False, True])
@pytest.mark.parametrize("mask", GIVEN.values(), ids=GIVEN)
def test_a_mask_that_leaves_nothing_out_at_first_is_exact_later(
    mask: Callable[[Tensor, Tensor], Tensor], as_float: bool
) -> None:
    if as_float and mask is GIVEN["small"]:
        pytest.skip("a float input of 0 and 1 is a mask only by what it is multiplied with")
    x, ones = torch.randn(2, 6, 8), torch.ones(2, 6, dtype=torch.float if as_float else torch.long)
    model = Masked(mask)
    left_out = ones.clone()
    left_out[:, 4:] = 0
    expected = model(x, left_out)
    calibrated(model, x, ones, recipe=Recipe(outputs=False))
    assert not [t for t in the_plan(model).tensors for c in t.consumers if "add" in c]
    assert [c for c in the_plan(model).left_float if ".softmax" in f".{c}" and "holds a mask" in c]
    torch.testing.assert_close(model(x, left_out), expected, rtol=0, atol=0.06)
    # Both products are on grids, and so are the weights between them.
    assert serving(model, "", "matmul", 0, 1).spec.clip == (0.0, 255 / 256)


class Decoder(nn.Module):
    """Rotary positions, norms and masks in one block, as Llama's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.rope, self.qkv = LlamaNorm(), Rotary(8), nn.Linear(8, 24)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        cos, sin = self.rope(x, positions)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        q, k = (t * cos + rotate_half(t) * sin for t in (q, k))
        scores = q @ k.transpose(-2, -1) * 8**-0.5
        scores = scores + (1.0 - mask[:, None].to(x.dtype)) * torch.finfo(x.dtype).min
        weights = F.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
        return self.out(x + weights @ v)


def test_the_file_of_a_decoder_computes_what_the_converted_model_does(tmp_path: Path) -> None:
    x, mask = torch.randn(2, 12, 8), torch.ones(2, 12, dtype=torch.long)
    mask[:, 9:] = 0
    model = Decoder()
    prepare(model, "int8", (x, mask))
    for _ in range(2):
        model.train()(x, mask)
    quantized = convert(model, (x, mask))
    agreement = verify(quantized, export(quantized, "fake_quant_onnx", tmp_path / "decoder"))
    assert agreement.parameters_equal
    assert agreement.max_steps <= 1.001
