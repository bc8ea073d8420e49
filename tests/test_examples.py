"""The examples and the README's code run as they stand; what its code makes is checked."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from examples import (
    amct_migration,
    digits,
    distillation,
    fine_tune,
    lstm,
    mixed_precision,
    mobilenet,
    own_exporter,
    residual_cnn,
    third_party_qdq,
    transformer,
)
from lightning_qat import ActivationSpec, QuantizedModel, Recipe, Schedule, WeightSpec
from tests.tiny_module import TinyModule, random_loader

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


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


def agreements(out: Path) -> dict[str, Any]:
    """What the manifest says of every target: whether its numbers are the model's."""
    targets = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["targets"]
    return {name: target["agreement"]["parameters_equal"] for name, target in targets.items()}


def test_a_residual_network_goes_to_every_target(tmp_path: Path) -> None:
    targets = ["fake_quant_onnx", "cann"]  # the digits example writes tflite, which takes longest
    assert residual_cnn.main(epochs=2, out=tmp_path, targets=targets) > 50
    assert agreements(tmp_path) == dict.fromkeys(targets, True)


def test_a_mobilenet_starts_from_a_float_checkpoint(tmp_path: Path) -> None:
    before, after = mobilenet.main(epochs=5, out=tmp_path)
    assert before > 50
    assert after > before - 10
    # The same from a checkpoint that is there: what is trained in float is what it was.
    again, _ = mobilenet.main(weights=tmp_path / "float.pth", epochs=1, out=tmp_path)
    assert again == before


def test_an_lstm_is_fine_tuned(tmp_path: Path) -> None:
    before, after = lstm.main(epochs=3, samples=1024, out=tmp_path)
    assert after < before + 0.02 < 0.2
    assert agreements(tmp_path) == {"fake_quant_onnx": True, "cann": True}


def test_a_transformer_encoder_trains_quantized(tmp_path: Path) -> None:
    # Always no is right in 59 % of the sequences.
    assert transformer.main(epochs=4, samples=1024, out=tmp_path) > 0.65
    assert agreements(tmp_path) == {"fake_quant_onnx": True}


def test_a_student_of_few_bits_learns_from_a_float_teacher(tmp_path: Path) -> None:
    before, after = distillation.main(epochs=6, out=tmp_path)
    assert after > before - 15 > 40
    assert agreements(tmp_path) == {"fake_quant_onnx": True}
    # One network is in the file: of the two, the student.
    layers = QuantizedModel.load(tmp_path / "distilled.pt2").layers
    assert {layer.name.split(".")[0] for layer in layers} == {"student"}


def test_two_processes_agree_on_their_ranges(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "examples.ddp", "--epochs=1", f"--out={tmp_path}"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "ranges are the same in 2 processes" in done.stdout
    assert agreements(tmp_path) == {"fake_quant_onnx": True}


def test_the_measured_layers_choose_their_bits(tmp_path: Path) -> None:
    before, after = mixed_precision.main(epochs=5, bits=(8, 4), budget=2.0, out=tmp_path)
    assert after > before - 10 > 40
    recipe = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))["recipe"]
    assert recipe["overrides"]


def test_a_script_for_amct_runs_before_and_after(tmp_path: Path) -> None:
    amct_migration.main(epochs=1, out=tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"record.txt", "before_deploy_model.onnx", "classifier_deploy_model.onnx"} <= names
    assert agreements(tmp_path) == {"cann": True}


def test_a_model_of_another_tool_is_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same, accuracy = third_party_qdq.main(epochs=4, out=tmp_path)
    assert same > 99
    assert accuracy > 50
    assert "error: " not in capsys.readouterr().out


def test_an_exporter_of_ones_own_is_verified_and_compared(tmp_path: Path) -> None:
    agreement, comparison = own_exporter.main(tmp_path)
    assert agreement.parameters_equal
    assert agreement.max_steps < 0.01
    assert comparison.judgement == "Every layer computes what the model does."
    assert comparison.departure is None


def test_the_notebook_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Its cells as plain Python, without a kernel. Left out are installing, and plots where there is
    # no matplotlib.
    cells = json.loads((EXAMPLES / "quantize_and_look.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code[0]["metadata"]["tags"] == ["install"]
    assert not any(cell["outputs"] for cell in code)
    left_out = {"install"}
    if not all(map(importlib.util.find_spec, ("matplotlib", "IPython"))):
        left_out.add("plot")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    scope: dict[str, Any] = {"__name__": "__main__"}
    for cell in code:
        if not left_out & {*cell["metadata"].get("tags", ())}:
            exec("".join(cell["source"]).replace("EPOCHS = 20", "EPOCHS = 6"), scope)
    assert scope["accuracy"](scope["net"]) > 60
    assert agreements(tmp_path / "out") == {"fake_quant_onnx": True}
    printed = capsys.readouterr().out
    assert "one layer quantized at a time" in printed
    assert "compared with the converted model" in printed


def test_every_example_is_short_listed_and_says_how_to_run_it() -> None:
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for file in sorted(EXAMPLES.iterdir()):
        if file.suffix not in (".py", ".yaml", ".ipynb") or file.name == "__init__.py":
            continue
        assert f"]({file.name})" in table, file.name
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".py":
            commands = re.findall(r"`(python (?:-m examples\.|examples/)\w+[^`]*)`", table)
            said = [c for c in commands if file.stem in c]
            assert len(said) == 1 or file.stem == "cli", file.name
            assert any(f"    {command}" in text for command in said), file.name
            # The demo is the one that measures every runtime.
            assert len(text.splitlines()) < 100 or file.name == "digits.py", file.name


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
