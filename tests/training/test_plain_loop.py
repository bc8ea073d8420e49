"""A loop that only calls ``prepare``: one commit per forward, with the ranges of a callback."""

import copy
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lightning_qat import prepare
from lightning_qat.quantizers import range_observer
from lightning_qat.quantizers.range_observer import ForwardObservations, RangeObserver
from lightning_qat.recipe.specs import ActivationSpec
from lightning_qat.training.range_sync import activation_quantizers, commit_ranges
from tests.join_networks import NETWORKS, PIECES, inputs_for
from tests.models import INPUTS_ONLY, ResidualAdd, linear

# The first forward, which plans, runs a reentrant checkpoint without gradients.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")

Commits = list[int]
"""The number of quantizers in each commit."""


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> Commits:
    sizes: Commits = []
    original = range_observer.commit_together

    def counted(quantizers: Any, batch: Tensor) -> None:
        sizes.append(len(quantizers))
        original(quantizers, batch)

    monkeypatch.setattr(range_observer, "commit_together", counted)
    return sizes


def ranges(model: nn.Module) -> dict[str, tuple[float, float, float]]:
    """Each quantizer's range and number of batches."""
    quantizers = activation_quantizers(model).items()
    return {
        name.removesuffix(".input_quantizer"): (
            float(q.min_val),
            float(q.max_val),
            float(q.batches),
        )
        for name, q in quantizers
    }


def prepared_linear() -> Any:
    model = linear()
    prepare(model, INPUTS_ONLY)
    return model.train()


def defer(model: nn.Module) -> nn.Module:
    for quantizer in activation_quantizers(model).values():
        quantizer.deferred = True
    return model


# When


def test_the_first_batch_gives_a_range_at_once_and_others_at_the_end_of_the_forward() -> None:
    """Both ends of a range are on the grid: they are quantized to themselves."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Flatten())
    prepare(model, INPUTS_ONLY)
    quantized: list[Tensor] = []
    quantizer = activation_quantizers(model)["0.input_quantizer"]
    quantizer.register_forward_hook(lambda *args: quantized.append(args[2].detach()))
    model(torch.tensor([[0.0], [1.0]]))
    assert ranges(model)["0"] == (0.0, 1.0, 1.0)
    torch.testing.assert_close(quantized[0], torch.tensor([[0.0], [1.0]]))
    # With the range of the batches before it, 3 saturates.
    model(torch.tensor([[0.0], [3.0]]))
    torch.testing.assert_close(quantized[1], torch.tensor([[0.0], [1.0]]))
    # Wider at once, then narrower by the average: 3 + (1 - 3) / 3.
    assert ranges(model)["0"] == (0.0, 3.0, 2.0)
    model(torch.tensor([[0.0], [1.0]]))
    torch.testing.assert_close(quantized[2], torch.tensor([[0.0], [1.0]]), atol=3 / 255, rtol=0.0)
    assert ranges(model)["0"] == (0.0, pytest.approx(7 / 3), 3.0)


@pytest.mark.parametrize("recipe", ["int8", INPUTS_ONLY], ids=["joins", "layers"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_later_forward_commits_once(name: str, recipe: Any, commits: Commits) -> None:
    model = NETWORKS[name][0]().train()
    prepare(model, recipe, inputs_for(name))
    model(inputs_for(name))
    commits.clear()
    for _ in range(2):
        model(inputs_for(name))
    # What sigmoid and softmax give has a range of its own.
    free = [q for q in activation_quantizers(model).values() if q.spec.clip is None]
    assert commits == [len(free)] * 2
    assert {float(q.batches) for q in free} == {3.0}


def test_frozen_ranges_and_evaluations_commit_nothing(commits: Commits) -> None:
    model, x = prepared_linear(), torch.randn(4, 6)
    model(x)
    before = ranges(model)
    model.eval()(2 * x)
    model.train()
    for quantizer in activation_quantizers(model).values():
        quantizer.observing = False
    model(2 * x)
    assert commits == []
    assert ranges(model) == before


def test_a_part_that_is_called_alone_commits_at_its_own_end(commits: Commits) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = linear(), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.backbone(x))
            return logits

    model: Any = Parts().train()
    prepare(model, INPUTS_ONLY)
    model(torch.randn(4, 6))
    features = model.backbone(torch.randn(4, 6))
    assert commits == [2]
    # A layer alone has no hooks.
    model.head(features)
    assert commits == [2]
    assert {batches for _, _, batches in ranges(model).values()} == {2.0}


def test_calibrations_that_differ_are_committed_one_by_one(commits: Commits) -> None:
    model: Any = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))).train()
    prepare(
        model,
        {
            **{"joins": False, "outputs": False},
            "overrides": {"[23]": {"activation": {"calibration": "minmax"}}},
        },
    )
    for _ in range(2):
        model(torch.randn(8, 4))
    assert commits == [2, 2]


# What


@pytest.mark.parametrize("memory", ["fast", "compact"])
@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_gradients_and_ranges_are_those_of_a_callback(
    name: str, forwards: int, memory: Any
) -> None:
    """To the bit; several forwards before one backward are the steps of a GAN."""
    torch.manual_seed(0)
    plain = NETWORKS[name][0]().train()
    prepare(plain, "int8", inputs_for(name), memory)
    plain(inputs_for(name))
    like_callback = defer(copy.deepcopy(plain))
    for batch in range(3):
        results = []
        xs = [(batch + i + 1) * inputs_for(name) for i in range(forwards)]
        for model in (plain, like_callback):
            torch.manual_seed(batch)
            model.zero_grad()
            outputs = []
            for x in xs:
                outputs.append(model(x))
                if model is like_callback:
                    commit_ranges(model)
            torch.autograd.backward([output.square().sum() for output in outputs])
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            results.append([*outputs, *gradients, *model.buffers()])
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    "activation",
    [
        {"calibration": "minmax"},
        {"calibration": "histogram"},
        {"calibration": "percentile"},
        {"calibration": "mse"},
        {"calibration": "entropy"},
        {"samples": 64},
        {"bits": 4, "symmetric": True},
    ],
    ids=str,
)
def test_every_calibration_is_committed_as_a_callback_does(
    activation: dict[str, Any], commits: Commits
) -> None:
    plain: Any = ResidualAdd().train()
    x = torch.randn(4, 4, 6, 6)
    prepare(plain, {"activation": activation}, x)
    plain(x)
    like_callback = defer(copy.deepcopy(plain))
    for batch in range(3):
        x = (batch + 1) * torch.randn(4, 4, 6, 6)
        assert torch.equal(plain(x), like_callback(x))
        commit_ranges(like_callback)
        assert ranges(plain) == ranges(like_callback)
    assert commits == [len(ranges(plain))] * 3


def test_runs_of_one_module_are_one_batch_of_the_widest_range() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.layer(3 * x)

    model = Twice().train()
    prepare(model, INPUTS_ONLY)
    model(torch.tensor([[0.0], [1.0]]))
    assert ranges(model)["layer"] == (0.0, 3.0, 1.0)
    model(torch.tensor([[0.0], [5.0]]))
    assert ranges(model)["layer"] == (0.0, 15.0, 2.0)
    model(torch.tensor([[-4.0], [3.0]]))
    assert ranges(model)["layer"] == (-12.0, 13.0, 3.0)


@pytest.mark.parametrize("quantizer", ["learned", "ulq"])
def test_learning_starts_in_the_forward_of_the_last_calibration_batch(
    quantizer: str, commits: Commits
) -> None:
    model = linear().train()
    activation = {"quantizer": quantizer, "calibration_batches": 2}
    prepare(model, {"activation": activation, "joins": False, "outputs": False})
    quantizers = activation_quantizers(model).values()
    for calibrated in (False, True, True):
        model(torch.randn(4, 6)).square().sum().backward()
        assert {q.calibrated for q in quantizers} == {calibrated}
    assert {float(q.batches) for q in quantizers} == {2.0}
    assert commits == []


def test_relu_and_quantizer_are_one_pass_while_ranges_are_observed() -> None:
    model, x = prepared_linear(), torch.randn(4, 6)
    for _ in range(2):
        model(x)
    before = ranges(model)
    output = model(2 * x)
    names, node = [], output.grad_fn
    while node is not None:
        names.append(node.name())
        node = next(
            (n for n, _ in node.next_functions if n is not None and "Accumul" not in n.name()), None
        )
    assert not [name for name in names if "Relu" in name]
    assert all(ranges(model)[layer] != before[layer] for layer in before)


def test_what_is_not_finite_is_found_when_the_model_is_converted() -> None:
    model = prepared_linear()
    model(torch.randn(4, 6))
    model(torch.tensor([[float("nan"), 1.0, 2.0, 3.0, 4.0, 5.0]]))
    why = activation_quantizers(model)["0.input_quantizer"].why_not_final
    assert why is not None
    assert "not finite" in why


# Forwards that end otherwise


class Raises(nn.Module):
    """Raises between its layers when it is told to, or returns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.does: str = ""

    def forward(self, x: Tensor) -> Tensor | None:
        x = self.first(x)
        if self.does == "raise":
            raise RuntimeError("out of memory")
        self.result = self.second(x)
        return None if self.does == "return nothing" else self.result


def prepared_raises() -> Raises:
    model = Raises().train()
    prepare(model, INPUTS_ONLY)
    model(torch.ones(1, 2))
    return model


def test_a_forward_that_raises_is_not_observed() -> None:
    model = prepared_raises()
    before, model.does = ranges(model), "raise"
    with pytest.raises(RuntimeError, match="out of memory"):
        model(torch.full((1, 2), 3.0))
    assert ranges(model) == before
    model.does = ""
    model(torch.full((1, 2), 5.0))
    assert ranges(model)["first"] == (3.0, 5.0, 2.0)


def test_a_hook_of_the_user_that_raises_leaves_no_observation() -> None:
    model = linear().train()
    refuse = [False]

    def hook(*_: object) -> None:
        if refuse[0]:
            raise RuntimeError("not this output")

    model.register_forward_hook(hook)
    prepare(model, INPUTS_ONLY)
    model(torch.ones(1, 6))
    before, refuse[0] = ranges(model), True
    with pytest.raises(RuntimeError, match="not this output"):
        model(torch.full((1, 6), 3.0))
    assert ranges(model) == before


def test_a_second_try_within_the_handler_of_the_first_is_observed() -> None:
    model = prepared_raises()
    model.does = "raise"
    try:
        model(torch.full((8, 2), 9.0))
    except RuntimeError:
        model.does = ""
        model(torch.full((1, 2), 3.0))
    assert ranges(model)["first"] == (2.0, 3.0, 2.0)


def test_a_forward_that_returns_nothing_is_observed() -> None:
    model = prepared_raises()
    model.does = "return nothing"
    model(torch.full((1, 2), 3.0))
    assert ranges(model)["first"] == (2.0, 3.0, 2.0)


# Forwards that backward runs again


class Checkpointed(nn.Module):
    """What a block reads has a reader outside, which may come before it."""

    def __init__(self, reentrant: bool, outside_first: bool) -> None:
        super().__init__()
        self.stem, self.side, self.block = (nn.Linear(4, 4) for _ in range(3))
        self.reentrant, self.outside_first = reentrant, outside_first

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) * 1
        before = self.side(x) if self.outside_first else 0
        y = checkpoint(lambda x: F.gelu(self.block(x)), x, use_reentrant=self.reentrant)
        return y + (before if self.outside_first else self.side(x))


def quantized_inputs(layer: Any) -> list[Tensor]:
    """What a layer's product reads in each run, from now on."""
    found: list[Tensor] = []
    layer.input_quantizer.register_forward_hook(lambda *args: found.append(args[2].detach()))
    return found


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("outside_first", [False, True])
@pytest.mark.parametrize("recipe", ["int8", INPUTS_ONLY], ids=["joins", "layers"])
def test_backward_runs_a_checkpointed_part_with_the_range_of_the_forward(
    recipe: Any, outside_first: bool, reentrant: bool, commits: Commits
) -> None:
    torch.manual_seed(0)
    model = Checkpointed(reentrant, outside_first).train()
    prepare(model, recipe, torch.randn(8, 4))
    model(torch.randn(8, 4))
    commits.clear()
    seen = quantized_inputs(model.block)
    for batch in range(1, 4):
        loss = model(batch * torch.randn(8, 4)).square().sum()
        after, in_forward, count = ranges(model), seen[-1], len(seen)
        loss.backward()
        assert len(seen) == count + 1
        assert torch.equal(seen[-1], in_forward)
        assert ranges(model) == after
        assert {batches for _, _, batches in after.values()} == {batch + 1.0}
    assert len(commits) == 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_that_is_checkpointed_as_a_whole(reentrant: bool) -> None:
    model = prepared_linear()
    model(torch.randn(4, 6))
    seen = quantized_inputs(model[2])
    x = (3 * torch.randn(4, 6)).requires_grad_()
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(*seen)
    assert {batches for _, _, batches in ranges(model).values()} == {2.0}


def test_without_gradients_every_quantizer_commits_at_once(commits: Commits) -> None:
    """A function of the user's may run without gradients, and again with them."""
    model = prepared_linear()
    with torch.no_grad():
        for batch in (1.0, 3.0):
            model(torch.full((1, 6), batch))
    assert ranges(model)["0"] == (2.0, 3.0, 2.0)
    assert commits == []


# Compiled, distributed, on several devices


def test_a_compiled_model_has_the_outputs_and_ranges_of_an_eager_one() -> None:
    torch._dynamo.reset()
    name = "inverted residual"
    eager = PIECES[name][0]().train()
    prepare(eager, "int8", inputs_for(name))
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for batch in range(3):
        x = (batch + 1) * inputs_for(name)
        torch.manual_seed(batch)
        expected = eager(x)
        torch.manual_seed(batch)
        assert torch.equal(compiled(x), expected)
        assert ranges(model) == ranges(eager)


def batch_of(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(4, 6, generator=generator) * (step + 1 + rank)


def train_on_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = prepared_linear()
    parallel: Callable[[Tensor], Tensor] = DistributedDataParallel(model)
    for step in range(3):
        parallel(batch_of(rank, step)).square().sum().backward()
    torch.save(ranges(model), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_data_parallel_processes_follow_the_ranges_of_the_first(tmp_path: Path) -> None:
    """DistributedDataParallel sends the first process's buffers before each forward."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = int(one.getsockname()[1])
    mp.spawn(train_on_rank, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    low = [-float(-batch_of(0, step).amin()) for step in range(3)]
    assert first["0"][0] == pytest.approx(lower_end(low))
    last = float(batch_of(1, 2).amin())
    assert second["0"][0] == pytest.approx(lower_end([*low[:2], last]))


def lower_end(batches: list[float]) -> float:
    """What follows the minima of batches: their mean, lowered at once by a lower one."""
    end = batches[0]
    for count, low in enumerate(batches[1:], 2):
        end = min(end + (low - end) / count, low)
    return end


def test_each_device_has_a_commit_of_its_own() -> None:
    """The meta device stands for any other."""
    observers = [RangeObserver(ActivationSpec()).to(device) for device in ("cpu", "meta", "cpu")]
    seen = ForwardObservations()
    for observer, high in zip(observers, (1.0, 2.0, 3.0), strict=True):
        seen.note(observer, torch.tensor([0.0, high], device=observer.min_val.device))
    seen.commit()
    assert [float(observers[i].max_val) for i in (0, 2)] == [1.0, 3.0]
