"""The plan as data: printed, stored in a state_dict, drawn, refused for another model."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.checkpoint.load import load_qat_checkpoint
from lightning_qat.joins.apply import plan_of
from lightning_qat.joins.plan import JoinPlan
from lightning_qat.prepare.prepare import prepare
from lightning_qat.recipe.recipe import Recipe
from tests.join_networks import NETWORKS, BasicBlock, ResNet, inputs_for, train_steps
from tests.joins.cases import AddsInPlace, PlainBlock, calibrated, serving, the_plan


@pytest.mark.parametrize("network", NETWORKS)
def test_a_state_dict_brings_the_plan_to_a_fresh_model(network: str, tmp_path: Path) -> None:
    x = inputs_for(network)
    model = calibrated(NETWORKS[network][0](), x)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    fresh = NETWORKS[network][0]()
    prepare(fresh, "int8")
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert the_plan(fresh).to_dict() == the_plan(model).to_dict()
    assert torch.equal(fresh.eval()(x), model(x))
    assert fresh.state_dict().keys() == model.state_dict().keys()
    # It is done: the next batch in training plans nothing.
    before = the_plan(fresh)
    train_steps(fresh, x, steps=1)
    assert plan_of(fresh) is before


def test_a_plan_of_another_model_is_refused_by_name() -> None:
    model = calibrated(ResNet(), inputs_for("resnet8"))
    state = model.state_dict()
    other = AddsInPlace()
    prepare(other, "int8")
    with pytest.raises(ValueError, match=r"The plan of quantized tensors names .*blocks\.0"):
        other.load_state_dict(state)


class Trained(pl.LightningModule):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Conv2d(2, width, 3, padding=1), BasicBlock(width, width, 1))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.net(x), 1).flatten(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_a_checkpoint_brings_the_plan(tmp_path: Path) -> None:
    x = torch.randn(8, 2, 6, 6)
    module = Trained(width=6)
    prepare(module, "int8")
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(x, batch_size=4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = load_qat_checkpoint(Trained, tmp_path / "last.ckpt")
    assert the_plan(loaded).to_dict() == the_plan(module).to_dict()
    add = serving(loaded, "net.1", "add", 1)
    assert add is loaded.net[1].conv1.input_quantizer
    assert torch.equal(loaded.eval()(x), module.eval()(x))


# The report


@pytest.mark.parametrize("network", NETWORKS)
def test_the_plan_prints_every_tensor_with_producers_and_consumers(network: str) -> None:
    report = prepare(NETWORKS[network][0](), "int8", inputs_for(network))
    plan = report.joins
    assert plan is not None
    assert str(plan) in str(report)
    lines = str(plan).splitlines()
    assert lines[0] == f"{len(plan.tensors)} tensors quantized, 0 calls left float"
    assert len(lines) == 1 + len(plan.tensors)
    for tensor, line in zip(plan.tensors, lines[1:], strict=True):
        producers, quantizer, consumers = line.split(" -> ")
        assert producers.strip() == ", ".join(tensor.producers)
        assert quantizer.split(" (")[0] == tensor.quantizer
        assert consumers == ", ".join(tensor.consumers)
        assert tensor.producers
        assert tensor.consumers


def test_the_plan_of_a_block_in_words() -> None:
    report = prepare(PlainBlock(), "int8", torch.randn(2, 4, 6, 6))
    assert str(report.joins).splitlines() == [
        "4 tensors quantized, 0 calls left float",
        "  input -> one.input_quantizer (8 bits) -> one, add:0[1]",
        "  relu -> two.input_quantizer (8 bits, from 0) -> two",
        "  two.conv2d -> qat_joins.add_0_0 (8 bits) -> add:0[0]",
        "  relu -> qat_joins.output_0_0 (8 bits, from 0) -> output:0[0]",
    ]


def test_calls_that_stay_float_are_named_with_the_reason() -> None:
    x = inputs_for("resnet8")
    report = prepare(ResNet(), Recipe(exclude=("blocks.1.*", "blocks.1")), x)
    assert report.joins is not None
    left = [line for line in report.joins.left_float if "blocks.1" in line]
    assert left
    assert all("not selected by the recipe" in line for line in left)
    assert f"  left float: {left[0]}" in str(report.joins).splitlines()


@pytest.mark.parametrize("network", NETWORKS)
def test_a_plan_survives_as_primitives(network: str) -> None:
    plan = prepare(NETWORKS[network][0](), "int8", inputs_for(network)).joins
    assert plan is not None
    again = JoinPlan.from_dict(plan.to_dict())
    assert again == plan
    assert again.to_dict() == plan.to_dict()
    assert str(again) == str(plan)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_flow_chart_has_a_node_per_tensor(network: str) -> None:
    plan = prepare(NETWORKS[network][0](), "int8", inputs_for(network)).joins
    assert plan is not None
    lines = plan.mermaid().splitlines()
    assert lines[0] == "flowchart TD"
    for number, tensor in enumerate(plan.tensors):
        assert f"  q{number}([" in "\n".join(lines)
        arrows = [line for line in lines if line.startswith(f"  q{number} --> ")]
        assert len(arrows) == len(tensor.consumers)
        assert [line for line in lines if line.endswith(f"--> q{number}")]
        assert sum(f'"{tensor.quantizer}<br/>' in line for line in lines) == 1
