"""The examples and the README's code run as they stand; what its code makes is checked."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from examples import digits, fine_tune
from lightning_qat import ActivationSpec, Recipe, Schedule, WeightSpec
from tests.tiny_module import TinyModule, random_loader

ROOT = Path(__file__).parents[1]


def block_with(words: str, page: str) -> str:
    """The page's only block of code with these words."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (block,) = (block for block in blocks if words in block)
    return block


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`")
@pytest.mark.xdist_group("tflite")
def test_the_digits_example_delivers_every_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("litert_torch")
    digits.main(seeds=1, out=tmp_path, epochs=2, qat=2)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"manifest.json", "digitsnet_qdq.onnx", "digitsnet_deploy_model.onnx"} <= names
    assert {"digitsnet.tflite", "report.html"} <= names
    printed = capsys.readouterr().out
    # All of the float model is in the one file that others are compared with.
    assert not [name for name in names if name.endswith(".data")]
    assert (tmp_path / "float.onnx").stat().st_size > 60_000
    assert printed.endswith(f"The report: {(tmp_path / 'report.html').resolve()}\n")
    assert printed.count("numbers equal to the bit; 899 samples") == 3
    scores = re.findall(r"^  (.+?) +(\d+\.\d+) % +\d+\.\d+ %$", printed, flags=re.MULTILINE)
    assert len(scores) == 10
    # Two epochs learn something: every runtime is far above chance, and above none by luck.
    assert min(float(score) for _, score in scores) > 30


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_the_fine_tuning_example_keeps_the_accuracy(tmp_path: Path) -> None:
    before, after = fine_tune.main(epochs=10, out=tmp_path)
    # An epoch at 1 % of the learning rate: far above chance, and near what it started from.
    assert before > 50
    assert abs(after - before) < 5
    assert (tmp_path / "manifest.json").is_file()


def test_the_first_code_block_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = block_with("QATCallback", "README.md")
    block = first.replace("max_epochs=10,", "max_epochs=3, accelerator='cpu', logger=False,")
    assert block != first
    exec(block, {"module": TinyModule(), "datamodule": random_loader()})
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_the_code_blocks_without_lightning_and_with_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = block_with("import ActivationSpec, Recipe, WeightSpec", "docs/recipes.md")
    alone = block_with("# your own loop", "docs/loops.md")
    scope: dict[str, Any] = {}
    exec(recipe.replace("Recipe(\n", "recipe = Recipe(\n"), scope)
    assert scope["recipe"] == Recipe(
        weight=WeightSpec(),
        activation=ActivationSpec(),
        exclude=("stem",),
        overrides={
            "head": {"weight": {"bits": 4}},
            "type:Linear": {"activation": {"symmetric": True}},
        },
    )
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(8, 4)
    scope = {"model": model, "example_inputs": x, "test_batch": x}
    exec(alone, scope | {"train": lambda model: model(x).sum().backward()})
    assert (tmp_path / "out" / "net_deploy_model.onnx").is_file()


def test_the_code_block_of_amcts_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("retrain.cfg").write_text("batch_num: 1\n", encoding="utf-8")
    block = block_with("lightning_qat.amct", "docs/migrate/amct.md")
    x = torch.randn(8, 4)
    scope = {"model": nn.Sequential(nn.Linear(4, 2)), "input_data": x}
    exec(block, scope | {"train": lambda model: model(x).sum().backward()})
    assert (tmp_path / "result" / "net_deploy_model.onnx").is_file()


def test_the_schedule_in_the_docs_is_the_default() -> None:
    page = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    (written,) = re.findall(r"`(Schedule\(calibration_batches=.*?\))`", page)
    assert eval(written, {"Schedule": Schedule}) == Schedule()
