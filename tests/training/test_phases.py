"""Phases set quantizers and batch norms; ranges are committed once per step, alike everywhere."""

import copy
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from lightning_qat.prepare.prepare import prepare
from lightning_qat.quantizers.weight import WeightQuantizer
from lightning_qat.recipe.schedule import Phase
from lightning_qat.training.phases import apply_phase, release_batchnorms, set_observing
from lightning_qat.training.range_sync import activation_quantizers, commit_ranges, drop_pending
from tests.models import INPUTS_ONLY, ResidualAdd, conv_bn_relu, inputs_for, linear

FLOAT = Phase("float", False, False, False)
CALIBRATE = Phase("calibrate", True, False, False)
QUANTIZE = Phase("quantize", True, True, False)
FROZEN = Phase("batchnorm_frozen", False, True, True)
PHASES = [FLOAT, CALIBRATE, QUANTIZE, Phase("observers_frozen", False, True, False), FROZEN]


def ranges(model: nn.Module) -> dict[str, tuple[float, float, float]]:
    return {
        name.removesuffix(".input_quantizer"): (
            q.min_val.item(),
            q.max_val.item(),
            q.batches.item(),
        )
        for name, q in activation_quantizers(model).items()
    }


def prepared_linear() -> nn.Module:
    model = linear()
    prepare(model, INPUTS_ONLY)
    apply_phase(model, CALIBRATE)
    return model


# Phases


@pytest.mark.parametrize("phase", PHASES, ids=lambda p: p.name)
def test_a_phase_reaches_every_quantizer(phase: Phase) -> None:
    model = conv_bn_relu()
    prepare(model, INPUTS_ONLY)
    apply_phase(model, phase)
    quantizers = activation_quantizers(model).values()
    assert {q.observing for q in quantizers} == {phase.observing}
    assert {q.quantizing for q in quantizers} == {phase.quantizing}
    assert {q.deferred for q in quantizers} == {True}
    weights = [m for m in model.modules() if isinstance(m, WeightQuantizer)]
    assert {q.quantizing for q in weights} == {phase.quantizing}


@pytest.mark.parametrize("phase", PHASES, ids=lambda p: p.name)
def test_a_phase_applied_twice_is_the_phase_applied_once(phase: Phase) -> None:
    model = conv_bn_relu()
    prepare(model, INPUTS_ONLY)
    for _ in range(2):
        apply_phase(model, phase)
        hooks = [
            len(m._forward_pre_hooks) for m in model.modules() if isinstance(m, nn.BatchNorm2d)
        ]
        assert sum(hooks) == (2 if phase.batchnorm_frozen else 0)


def test_in_the_float_phase_the_model_is_float_and_unobserved() -> None:
    model, x = prepared_linear(), inputs_for("linear")
    apply_phase(model, FLOAT)
    layer = model[0]
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    commit_ranges(model)
    assert ranges(model)["0"] == (0.0, 0.0, 0.0)


def statistics(model: nn.Module) -> list[Tensor]:
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    return [v.clone() for m in norms for v in (m.running_mean, m.num_batches_tracked)]  # type: ignore[misc, union-attr]


def test_a_frozen_batch_norm_stays_in_eval_mode_despite_train() -> None:
    model, x = conv_bn_relu(), inputs_for("conv_bn_relu")
    prepare(model, INPUTS_ONLY)
    model(x)
    apply_phase(model, FROZEN)
    before = statistics(model)
    model.train()
    held = model(x)
    assert all(torch.equal(a, b) for a, b in zip(statistics(model), before, strict=True))
    model.eval()
    assert torch.equal(model(x), held)


def test_batch_norm_weights_go_on_training_while_it_is_frozen() -> None:
    model = conv_bn_relu()
    prepare(model, INPUTS_ONLY)
    apply_phase(model, FROZEN)
    model.train()(inputs_for("conv_bn_relu")).square().sum().backward()
    assert model[1].weight.grad is not None
    assert bool(model[1].weight.grad.abs().sum() > 0)


@pytest.mark.parametrize("how", ["release_batchnorms", "apply_phase"])
def test_a_released_batch_norm_follows_train_and_eval_again(how: str) -> None:
    model, x = conv_bn_relu(), inputs_for("conv_bn_relu")
    prepare(model, INPUTS_ONLY)
    apply_phase(model, FROZEN)
    if how == "apply_phase":
        apply_phase(model, QUANTIZE)
    else:
        release_batchnorms(model)
    before = statistics(model)
    model.train()(x)
    assert not any(torch.equal(a, b) for a, b in zip(statistics(model), before, strict=True))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(m._forward_pre_hooks for m in norms)


def test_a_copy_of_a_frozen_model_can_be_released_on_its_own() -> None:
    model, x = conv_bn_relu(), inputs_for("conv_bn_relu")
    prepare(model, INPUTS_ONLY)
    apply_phase(model, FROZEN)
    twin = copy.deepcopy(model)
    release_batchnorms(twin)
    twin.train()(x)
    assert twin[1].training
    model.train()(x)
    assert not model[1].training


def test_set_observing_closes_and_opens_the_gate() -> None:
    model = prepared_linear()
    quantizers = activation_quantizers(model).values()
    set_observing(quantizers, False)
    model(inputs_for("linear"))
    assert all(q.pending is None for q in quantizers)
    set_observing(quantizers, True)
    model(inputs_for("linear"))
    assert all(q.pending is not None for q in quantizers)


def test_dropped_observations_leave_no_trace() -> None:
    model = prepared_linear()
    model(inputs_for("linear"))
    drop_pending(activation_quantizers(model).values())
    commit_ranges(model)
    assert set(ranges(model).values()) == {(0.0, 0.0, 0.0)}


# Committing ranges


def test_one_commit_takes_the_range_of_all_forwards_of_the_step() -> None:
    model = prepared_linear()
    model(torch.full((1, 6), -1.0))
    model(torch.full((1, 6), 3.0))
    commit_ranges(model)
    assert ranges(model)["0"] == (-1.0, 3.0, 1.0)
    model(torch.full((1, 6), 5.0))
    commit_ranges(model)
    # The moving average of (-1, 3) and (5, 5).
    assert ranges(model)["0"] == (2.0, 4.0, 2.0)


def test_within_a_step_the_scale_stays_the_same() -> None:
    model = prepared_linear()
    apply_phase(model, QUANTIZE)
    model(inputs_for("linear"))
    commit_ranges(model)
    before = ranges(model)
    scale = model[0].input_quantizer.qparams().scale
    model(inputs_for("linear") * 100)
    assert ranges(model) == before
    assert torch.equal(model[0].input_quantizer.qparams().scale, scale)


def test_a_layer_that_did_not_run_keeps_its_range() -> None:
    model = prepared_linear()
    model(inputs_for("linear"))
    commit_ranges(model)
    before = ranges(model)
    model[0](inputs_for("linear") * 10)
    commit_ranges(model)
    after = ranges(model)
    assert after["2"] == before["2"]
    assert after["0"] != before["0"]
    assert after["0"][2] == 2


def test_a_model_without_quantizers_commits_nothing() -> None:
    commit_ranges(nn.Linear(2, 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_and_no_range_changes(bad: float) -> None:
    model = ResidualAdd()
    prepare(model, INPUTS_ONLY)
    apply_phase(model, CALIBRATE)
    model(inputs_for("residual_add"))
    commit_ranges(model)
    before = ranges(model)
    model.conv1(torch.randn(1, 4, 6, 6))
    for layer, shape in ((model.conv2, (1, 4, 6, 6)), (model.head, (1, 4))):
        x = torch.randn(shape)
        x.view(-1)[1] = bad
        layer(x)
    with pytest.raises(
        ValueError,
        match=re.escape(
            "Activations must be finite to be given a range; NaN or infinity reached the input of "
            "'conv2', 'head'. The first of them is where to look"
        ),
    ):
        commit_ranges(model)
    assert ranges(model) == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_found_behind_any_other_batch(bad: float) -> None:
    model = prepared_linear()
    model[0](torch.tensor([[bad, 1.0, 2.0, 3.0, 4.0, 5.0]]))
    model[0](torch.randn(2, 6) * 100)
    with pytest.raises(ValueError, match="reached the input of '0'"):
        commit_ranges(model)


# Two processes


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def network_for_ranks() -> Any:
    torch.manual_seed(0)
    model = ResidualAdd()
    prepare(model, INPUTS_ONLY)
    apply_phase(model, CALIBRATE)
    # The statistics of half a batch are others; what is compared here are ranges.
    model.bn1.eval()
    return model


def steps_for_ranks() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 4, 6, 6, generator=generator) * (i + 1) for i in range(3)]


def without_head(model: Any, x: Tensor) -> None:
    model.conv2(nn.functional.relu(model.bn1(model.conv1(x))))


def observe_on_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = network_for_ranks()
    for batch in steps_for_ranks():
        if rank == 0:
            model(batch[:2])
        else:
            for sample in batch[2:].split(1):
                without_head(model, sample)
        commit_ranges(model)
    torch.save(ranges(model), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_find_the_ranges_of_one_process_on_the_whole_batch(tmp_path: Path) -> None:
    mp.spawn(observe_on_rank, (free_port(), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first == second
    model = network_for_ranks()
    for batch in steps_for_ranks():
        without_head(model, batch)
        model(batch[:2])
        commit_ranges(model)
    alone = ranges(model)
    assert first.keys() == alone.keys()
    assert first["conv1"] == alone["conv1"]
    for layer in ("conv2", "head"):
        # A convolution may sum the samples of another batch size in another order.
        assert first[layer] == pytest.approx(alone[layer], rel=1e-6)
