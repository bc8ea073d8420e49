"""The command that makes, converts and compares files of other tools, with a tool of our own.

``python -m benchmarks.other_tools`` runs the real ones; nothing here needs them.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import other_tools
from benchmarks.tool_files.compare import compared, differences
from benchmarks.tool_files.tool import TOOLS
from tests.exporters.cann.qdq_files import net_file
from tests.exporters.cann.qdq_graphs import Qdq


def quantized_conv(bias: float, folder: Path) -> Path:
    """A 1x1 convolution and relu: weight 64 * 0.5, grids of 0.25; accumulators step by 0.125."""
    net = Qdq([2, 1, 2, 2])
    weight = net.weight(np.array([[[[64]]]]), [0.5])
    y = net.node("Conv", net.fake("x", 0.25), weight, net.constant([bias], np.float32), name="conv")
    return net_file(net, folder, net.fake(net.node("Relu", y), 0.25))


def test_a_file_whose_bias_lies_on_the_accumulators_grid_differs_nowhere(tmp_path: Path) -> None:
    found = compared(quantized_conv(0.375, tmp_path), tmp_path, grid_weights=False)
    assert (found["layers"], found["lint"], found["left_float"]) == (1, [], [])
    assert found["steps"] == found["float_bias"] == 0.0
    assert found["tensors"] == 2  # what the relu gives, and the output


def test_a_rounded_bias_is_seen_in_steps_of_the_tensor_behind_it(tmp_path: Path) -> None:
    # 0.36 becomes 3 * 0.125 = 0.375, which is half way to the next multiple of 0.25.
    found = compared(quantized_conv(0.36, tmp_path), tmp_path, grid_weights=False)
    assert found["float_bias"] == 0.0
    assert found["steps"] == 1.0


def test_a_wrong_file_is_found_out(tmp_path: Path) -> None:
    right, other = tmp_path / "right", tmp_path / "other"
    right.mkdir()
    other.mkdir()
    compared(quantized_conv(0.375, right), right, grid_weights=False)
    steps = differences(quantized_conv(0.875, other), right / "rounded_deploy_model.onnx", other)
    assert max(steps.values()) == 2.0


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: another one would import torch anew."""
    monkeypatch.setattr(other_tools, "in_process", lambda target, *args: next(target(*args)))


def made(folder: Path, tool: str, *lines: dict[str, str]) -> None:
    """What a tool's own environment leaves in the folder."""
    text = "".join(f"{json.dumps(line)}\n" for line in ({"versions": "tool 1.0"}, *lines))
    (folder / tool / "made.jsonl").write_text(text)


@pytest.mark.usefixtures("here")
def test_files_of_an_environment_that_is_not_this_one_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tflite").mkdir()
    quantized_conv(0.375, tmp_path / "tflite").rename(tmp_path / "tflite" / "conv.onnx")
    made(tmp_path, "tflite", {"file": "conv"}, {"file": "lstm", "not made": "ValueError: no LSTM"})
    assert other_tools.main(["--folder", str(tmp_path), "--tool", "tflite"]) == 0
    said = capsys.readouterr().out
    assert "| TFLite through tf2onnx: tool 1.0 | 1 | 1 | 1 | 2 | 0.00 | 0.00 | 0 |" in said
    assert "tflite/lstm is not written: ValueError: no LSTM" in said


@pytest.mark.usefixtures("here")
def test_a_file_that_cannot_be_read_is_named_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tflite").mkdir()
    (tmp_path / "tflite" / "broken.onnx").write_bytes(b"no model")
    made(tmp_path, "tflite", {"file": "broken"})
    assert other_tools.main(["--folder", str(tmp_path), "--tool", "tflite"]) == 1
    assert "tflite/broken is refused: ValueError" in capsys.readouterr().out


def test_every_tool_says_whether_it_is_there_or_how_to_get_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert other_tools.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(TOOLS)
    for line, tool in zip(lines, TOOLS.values(), strict=True):
        assert line.endswith(tool.versions() or tool.install)
