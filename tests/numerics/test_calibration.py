"""How the ranges of batches become one range."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_qat import Recipe, prepare
from lightning_qat.numerics.calibration.calibrations import CALIBRATIONS
from lightning_qat.numerics.calibration.histogram import (
    HISTOGRAM_BINS,
    SMALLEST_REACH,
    add_to_histogram,
    histogram_range,
)
from lightning_qat.numerics.calibration.search import (
    entropy_range,
    least_squares_range,
    percentile_range,
)
from lightning_qat.numerics.kernels import loops as kernels
from lightning_qat.numerics.min_max import batch_range
from lightning_qat.numerics.qparams import IntegerGrid
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.quantizers.range_observer import commit_together
from lightning_qat.recipe.specs import ActivationSpec


class CountedOperations(TorchDispatchMode):
    """How many operations a device would be given."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def follow(update: str, batches: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    low, high, count = torch.tensor(0.0), torch.tensor(0.0), torch.tensor(0.0)
    for batch_low, batch_high in batches:
        CALIBRATIONS[update].update(low, high, torch.tensor([-batch_low, batch_high]), count)
        count += 1
    return low, high


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_batch_s_range_is_minus_min_and_max_in_float32(dtype: torch.dtype) -> None:
    found = batch_range(torch.tensor([[-1.5, 0.0], [3.0, 2.0]], dtype=dtype))
    assert found.dtype is torch.float32
    assert found.tolist() == [1.5, 3.0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([2.0, 3.0], [-2.0, 3.0]), ([-3.0, -2.0], [3.0, -2.0]), ([0.5], [-0.5, 0.5])],
)
def test_a_range_need_not_hold_zero(values: list[float], expected: list[float]) -> None:
    assert batch_range(torch.tensor(values)).tolist() == expected


def test_a_range_has_no_gradient() -> None:
    assert not batch_range(torch.randn(4, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (float("nan"), [torch.inf, torch.inf]),
        (float("inf"), [1.0, torch.inf]),
        (float("-inf"), [torch.inf, 2.0]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_infinite_in_the_range_so_no_maximum_loses_it(
    bad: float, expected: list[float], dtype: torch.dtype
) -> None:
    found = batch_range(torch.tensor([-1.0, bad, 2.0], dtype=dtype))
    assert found.tolist() == expected
    assert torch.maximum(found, torch.tensor([9.0, 9.0])).isinf().any()


def test_the_maximum_of_two_ranges_is_the_range_of_both() -> None:
    a, b = torch.randn(10), torch.randn(10) * 2
    assert torch.equal(
        torch.maximum(batch_range(a), batch_range(b)), batch_range(torch.cat((a, b)))
    )


def test_moving_average_is_the_mean_at_first() -> None:
    low, high = follow("moving_average", [(-1.0, 1.0), (-3.0, 2.0), (-2.0, 6.0)])
    # Three additions in float32.
    torch.testing.assert_close(low, torch.tensor(-2.0), rtol=3e-7, atol=0)
    torch.testing.assert_close(high, torch.tensor(3.0), rtol=3e-7, atol=0)


def test_the_first_batch_replaces_the_zeros() -> None:
    for update in CALIBRATIONS:
        assert [float(end) for end in follow(update, [(1.0, 3.0)])] == [1.0, 3.0]


def test_moving_average_equals_the_loop_in_double_precision() -> None:
    batches = [(-float(a), float(b)) for a, b in torch.rand(300, 2)]
    low = high = 0.0
    for number, (batch_low, batch_high) in enumerate(batches):
        weight = max(0.01, 1.0 / (number + 1))
        low += (batch_low - low) * weight
        high += (batch_high - high) * weight
    found = follow("moving_average", batches)
    # Rounding of 300 float32 updates, most of which is averaged away.
    torch.testing.assert_close(found[0], torch.tensor(low), rtol=2e-5, atol=0)
    torch.testing.assert_close(found[1], torch.tensor(high), rtol=2e-5, atol=0)


def test_a_settled_moving_average_moves_by_one_hundredth() -> None:
    low, high = torch.tensor(-1.0), torch.tensor(1.0)
    CALIBRATIONS["moving_average"].update(low, high, torch.tensor([2.0, 3.0]), torch.tensor(5000.0))
    # One float32 operation.
    torch.testing.assert_close(low, torch.tensor(-1.01), rtol=1.2e-7, atol=0)
    torch.testing.assert_close(high, torch.tensor(1.02), rtol=1.2e-7, atol=0)


def test_minmax_never_narrows() -> None:
    low, high = follow("minmax", [(-1.0, 1.0), (-0.5, 2.0), (-3.0, 0.5), (0.0, 0.0)])
    assert [float(low), float(high)] == [-3.0, 2.0]


def test_minmax_follows_a_range_above_zero() -> None:
    assert [float(end) for end in follow("minmax", [(2.0, 3.0), (1.0, 2.0)])] == [1.0, 3.0]


def test_a_sample_sees_every_feature() -> None:
    # 2 ** 19 values: every 16th of them would be of 16 features, and never of this one.
    x = torch.zeros(32, 64, 256)
    x[..., 5] = 1.0
    for search in (percentile_range, least_squares_range):
        assert float(search(x, IntegerGrid(-128, 127), False, 2**15)[1]) > 0.9


@pytest.mark.parametrize("bits", [2, 4, 8, 12])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_least_squared_error_is_that_of_rounding_every_value(
    bits: int, symmetric: bool
) -> None:
    half = 2 ** (bits - 1)
    grid = IntegerGrid(-half, half - 1) if symmetric else IntegerGrid(0, 2 * half - 1)
    x = torch.randn(3000) * torch.rand(3000) + 0.3
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    values, errors = x.double().numpy(), {}
    for percent in range(10, 120):
        low_end, high_end = low * percent / 100, high * percent / 100
        if symmetric:
            scale, zero = max(-low_end, high_end) / grid.qmax, 0.0
        else:
            scale = (high_end - low_end) / (grid.qmax - grid.qmin)
            zero = np.round(grid.qmin - low_end / scale)
        integers = np.clip(np.round(values / scale) + zero, grid.qmin, grid.qmax)
        errors[percent] = float((((integers - zero) * scale - values) ** 2).sum())
    found = float(least_squares_range(x, grid, symmetric)[1]) / high
    assert errors[round(100 * found)] == pytest.approx(min(errors.values()), rel=1e-4)


def test_searches_take_as_many_operations_at_any_bits() -> None:
    # One look at the values for each range that is tried took up to 3246.
    x = torch.rand(4096)
    counts, reach = histogram_of(x)
    searches: dict[str, Callable[[IntegerGrid], Tensor]] = {
        "mse": lambda grid: least_squares_range(x, grid, False),
        "entropy": lambda grid: entropy_range(x, grid, False),
        "histogram": lambda grid: histogram_range(counts, reach, grid, False),
    }
    taken = {}
    for name, search in searches.items():
        for bits in (2, 4, 8):
            with CountedOperations() as counted:
                search(IntegerGrid(0, 2**bits - 1))
            taken[name, bits] = counted.number
    most = {"mse": 130, "entropy": 130, "histogram": 300}
    assert all(number < most[name] for (name, _), number in taken.items())
    assert all(number == taken[name, 8] for (name, _), number in taken.items())


def test_a_tensor_of_no_more_than_the_samples_is_looked_at_whole() -> None:
    x = torch.randn(4, 32)
    for samples in (128, 1000):
        assert torch.equal(batch_range(x, samples), batch_range(x))


def test_a_sampled_range_is_that_of_evenly_spaced_runs_of_64() -> None:
    # 4 runs of 64 in 1000 values: the next step after 250 that shares no factor with 1000 is 251.
    x = torch.arange(1000.0)
    seen = [value for start in (0, 251, 502, 753) for value in range(start, start + 64)]
    assert batch_range(x, 4 * 64 + 63).tolist() == [-min(seen), max(seen)]
    hidden = torch.where(torch.isin(x, torch.tensor(seen)), x, torch.nan)
    assert batch_range(hidden, 4 * 64 + 63).tolist() == [-min(seen), max(seen)]


@pytest.mark.parametrize("samples", [64, 100, 4096, 32 * 1024 - 1])
@pytest.mark.parametrize("shape", [(32, 1024), (8, 16, 16, 16), (32767,), (3, 5, 7, 499)])
def test_a_sample_has_no_more_values_than_asked_and_half_of_them_at_least(
    shape: tuple[int, ...], samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, sizes, aminmax = torch.randn(shape), [], torch.aminmax
    monkeypatch.setattr(kernels, "value_range", lambda *_: None)
    monkeypatch.setattr(torch, "aminmax", lambda v: (sizes.append(v.numel()), aminmax(v))[1])
    batch_range(x, samples)
    (size,) = sizes
    assert samples / 2 <= size <= samples


def test_transposed_tensors_are_sampled_without_a_copy_of_all() -> None:
    x = torch.randn(16, 8, 32, 32)
    assert torch.equal(batch_range(x.permute(0, 2, 3, 1), 8192), batch_range(x, 8192))
    for other in (x.to(memory_format=torch.channels_last), x[:, ::2], x[:, :1].expand_as(x)):
        found, whole = batch_range(other, 8192), batch_range(other)
        assert bool((found <= whole).all())
        assert torch.equal(whole, torch.stack((-other.amin(), other.amax())))


def test_searches_and_histograms_take_the_samples_that_are_asked_for() -> None:
    x = torch.randn(2**16)
    spec = ActivationSpec(calibration="histogram", samples=1000)
    quantizer = ActivationQuantizer(spec).train()
    quantizer(x)
    # 66 values apart: the next step that shares no factor with 65,536 is 67.
    assert int(quantizer.histogram.sum()) == len(range(0, 2**16, 67))
    whole = ActivationQuantizer(ActivationSpec(calibration="percentile", samples=2**16)).train()
    whole(x)
    torch.testing.assert_close(whole.max_val, torch.quantile(x, 0.9999))


# Histograms


def histogram_of(*batches: Tensor) -> tuple[Tensor, Tensor]:
    counts, reach = torch.zeros(HISTOGRAM_BINS, dtype=torch.int64), torch.tensor(SMALLEST_REACH)
    for batch in batches:
        add_to_histogram(counts, reach, batch)
    return counts, reach


def test_a_histogram_counts_every_value_in_its_bin() -> None:
    counts, reach = histogram_of(torch.tensor([-1.0, 0.0, 0.3, 0.3]), torch.tensor([-0.001]))
    assert float(reach) == 1.0
    step = 2 / HISTOGRAM_BINS
    expected = {0: 1, 4096: 1, 4096 + int(0.3 / step): 2, 4096 - 5: 1}
    assert {int(i): int(counts[i]) for i in counts.nonzero()} == expected


@pytest.mark.parametrize("order", [(0.01, 1.0, 37.0), (37.0, 0.01, 1.0)])
def test_a_wider_batch_merges_bins_without_splitting_a_count(order: tuple[float, ...]) -> None:
    batches = {size: torch.randn(2000) * size for size in (0.01, 1.0, 37.0)}
    counts, reach = histogram_of(*(batches[size] for size in order))
    whole = torch.cat([batches[size] for size in order]).double()
    assert 2 * whole.abs().max() > float(reach) >= whole.abs().max()
    edges = torch.linspace(-float(reach), float(reach), HISTOGRAM_BINS + 1, dtype=torch.float64)
    assert torch.equal(counts.double(), torch.histogram(whole, edges).hist)


def test_a_batch_that_is_not_finite_is_not_counted() -> None:
    one = histogram_of(torch.tensor([1.0, 2.0]))
    other = histogram_of(torch.tensor([1.0, 2.0]), torch.tensor([5.0, torch.nan, torch.inf]))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


def squared_error(x: Tensor, low: float, high: float, grid: IntegerGrid) -> float:
    """In double precision."""
    scale = (high - low) / (grid.qmax - grid.qmin)
    origin = round(grid.qmin - low / scale)
    integers = ((x.double() / scale).round() + origin).clamp(grid.qmin, grid.qmax)
    return float(((integers - origin) * scale - x.double()).square().sum())


BATCHES = {
    "normal": lambda: [torch.randn(1000) * (1 + i) for i in range(4)],
    "from zero": lambda: [torch.randn(1000).relu() * (1 + i) for i in range(4)],
    "long tail": lambda: [torch.randn(1000).exp() - 0.5 for _ in range(4)],
    "outlier": lambda: [torch.randn(1000), torch.cat((torch.randn(999), torch.tensor([60.0])))],
}


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("kind", BATCHES)
def test_a_histogram_s_range_is_nearly_the_best_and_no_worse_than_torch_ao_s(
    kind: str, bits: int
) -> None:
    batches, grid = BATCHES[kind](), IntegerGrid.activation(bits)
    x = torch.cat(batches)
    low, high = (
        histogram_range(*histogram_of(*batches), grid, False) * torch.tensor([-1, 1])
    ).tolist()
    own = squared_error(x, low, high, grid)
    smallest, largest = min(float(x.min()), 0.0), float(x.max())
    brute = min(
        squared_error(x, smallest * i / 40, largest * j / 40, grid)
        for i in (range(1, 41) if smallest < 0 else (0,))
        for j in range(1, 41)
    )
    # Of 8 bits the bins are an eighth of a step at worst; of others the coarser search differs.
    assert own <= brute * 1.05
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import HistogramObserver

        theirs = HistogramObserver(quant_min=0, quant_max=2**bits - 1)
        for batch in batches:
            theirs(batch)
        scale, zero_point = theirs.calculate_qparams()
    their_low = float(-zero_point * scale)
    their_high = their_low + float(scale) * (2**bits - 1)
    assert own <= squared_error(x, their_low, their_high, grid) * 1.05


def test_a_symmetric_range_has_the_least_squared_error_of_all_reaches() -> None:
    x, grid = torch.randn(4000), IntegerGrid(-8, 7)
    found = histogram_range(*histogram_of(x), grid, True)
    reach = float(found.max())

    def error(largest: float) -> float:
        scale = largest / 7
        return float(((x.double() / scale).round().clamp(-8, 7) * scale - x).square().sum())

    best = min(error(float(x.abs().max()) * i / 500) for i in range(1, 501))
    assert error(reach) <= best * 1.02


def test_a_histogram_is_resumed_and_never_changed_in_eval_mode() -> None:
    batches = [torch.randn(500) * (1 + i) for i in range(4)]
    spec = ActivationSpec(bits=4, calibration="histogram")
    whole, first = ActivationQuantizer(spec), ActivationQuantizer(spec)
    for batch in batches:
        whole(batch)
    for batch in batches[:2]:
        first(batch)
    resumed = ActivationQuantizer(spec)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    before = {name: value.clone() for name, value in resumed.named_buffers()}
    resumed.eval()(batches[3] * 100)
    assert all(torch.equal(value, before[name]) for name, value in resumed.named_buffers())
    resumed.train()
    for batch in batches[2:]:
        resumed(batch)
    assert resumed.qparams().equal(whole.qparams())
    assert torch.equal(resumed.histogram, whole.histogram)


@pytest.mark.parametrize("count", [2000, 40_000, 400_000])
@pytest.mark.parametrize("zeros", [0.5, 0.9])
def test_zeros_do_not_make_an_entropy_range_cut_off_the_tail(count: int, zeros: float) -> None:
    """What relu gives is zeros by half and more; a share of 1.7 to 10.5 % of all was cut off."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, generator=generator).abs()
    x[torch.rand(count, generator=generator) < zeros] = 0
    _, high = CALIBRATIONS["entropy"].search(x, IntegerGrid.activation(8), False, count)
    assert float((x > high).float().mean()) < 1 / 256


AVERAGES = ("moving_average", "percentile", "mse", "entropy")


def test_averages_are_those_of_one_batch_at_a_time() -> None:
    assert [name for name, one in CALIBRATIONS.items() if one.averages] == [*AVERAGES]


@pytest.mark.parametrize("calibration", AVERAGES)
def test_a_wider_batch_widens_an_average_at_once_while_values_are_clipped(calibration: str) -> None:
    """Mean of 1 and 3 while nothing is quantized; 2 + (8 - 2) / 3 = 4, but 8 at once otherwise."""
    quantizer = ActivationQuantizer(ActivationSpec(calibration=calibration))
    quantizer.quantizing = False
    for high in (1.0, 3.0):
        quantizer.commit(torch.tensor([0.0, high]))
    assert float(quantizer.max_val) == 2.0
    quantizer.quantizing = True
    quantizer.commit(torch.tensor([6.0, 8.0]))
    assert (float(quantizer.min_val), float(quantizer.max_val)) == (-6.0, 8.0)
    quantizer.commit(torch.tensor([2.0, 4.0]))
    assert (float(quantizer.min_val), float(quantizer.max_val)) == (-5.0, 7.0)


def test_quantizers_that_clip_and_others_are_committed_together() -> None:
    several = [ActivationQuantizer(ActivationSpec()) for _ in range(3)]
    several[1].quantizing = False
    for high in (1.0, 3.0):
        commit_together(several, torch.tensor([[0.0] * 3, [high] * 3]))
    assert [float(q.max_val) for q in several] == [3.0, 2.0, 3.0]
    accepted = torch.tensor([True, True, False])
    commit_together(several, torch.tensor([[2.0] * 3, [9.0] * 3]), accepted)
    assert [float(q.min_val) for q in several] == pytest.approx([-2.0, -2 / 3, 0.0])
    assert [float(q.max_val) for q in several] == pytest.approx([9.0, 13 / 3, 3.0])


def test_a_histogram_of_old_batches_clips_no_more_than_its_share_of_a_new_one() -> None:
    """A sixteenth at 4 bits: 5 of 100 values may be clipped, 8 may not."""
    quantizer = ActivationQuantizer(ActivationSpec(bits=4, calibration="histogram"))
    quantizer(torch.linspace(0.0, 1.0, 100_000))
    for large, quantizing, whole in ((5, True, False), (8, False, False), (8, True, True)):
        quantizer.quantizing = quantizing
        batch = torch.linspace(0.0, 1.0, 100)
        batch[:large] = 3.0
        quantizer(batch)
        assert (float(quantizer.max_val) == 3.0) == whole


@pytest.mark.parametrize("calibration", ["moving_average", "percentile"])
def test_an_output_that_grows_from_nothing_reaches_its_target(calibration: str) -> None:
    """An average alone stays behind, and what it clips gets no gradient: 9 % of the error stay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    x = torch.randn(64, 4)
    target = 100 * x[:, :1] * x[:, 1:2]
    prepare(model, Recipe(activation=ActivationSpec(calibration=calibration)), x)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        torch.autograd.backward(loss)
        optimizer.step()
    assert loss < 0.02 * target.square().mean()
