"""The commands ``convert`` and ``lint`` on deploy files."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from lightning_qat import cli, convert_qat_model
from lightning_qat_exporters import CannExporter
from tests.exporters.cann.test_lint import change, valid


def test_lint_exits_with_1_on_errors_and_0_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = valid(tmp_path)
    path = tmp_path / "net_deploy_model.onnx"
    assert cli.main(["lint", str(path)]) == 0
    assert CannExporter().lint(str(path)) == CannExporter().lint(path) == ()
    assert capsys.readouterr().out == f"{path}: 0 errors, 0 warnings, 0 pieces of advice\n"
    change("fc", transB=1)(model)
    onnx.save(model, path)
    assert cli.main(["lint", str(path), "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)
    assert (finding["severity"], finding["node"], finding["got"]) == ("error", "fc", "transB = 1")
    assert set(finding) == {"severity", "node", "must", "got", "remedy"}


def test_convert_writes_what_the_function_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    valid(tmp_path)
    source, out, record = tmp_path / "qat.onnx", tmp_path / "cli", tmp_path / "record.txt"
    arguments = ["convert", str(source), "--to", "cann", "--out", str(out)]
    assert cli.main([*arguments, "--record", str(record), "--float-bias"]) == 0
    assert "2 layers on integers, 1 other readers" in capsys.readouterr().out
    convert_qat_model(source, tmp_path / "api", tmp_path / "api.txt", float_bias=True)
    for suffix in ("_deploy_model.onnx", "_fake_quant_model.onnx"):
        written = (tmp_path / f"cli{suffix}").read_bytes()
        assert written == (tmp_path / f"api{suffix}").read_bytes()
    assert record.read_bytes() == (tmp_path / "api.txt").read_bytes()


def test_a_product_is_an_option_of_both_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    valid(tmp_path)
    arguments = ["convert", str(tmp_path / "qat.onnx"), "--to", "cann", "--out"]
    assert cli.main([*arguments, str(tmp_path / "all")]) == 0
    assert cli.main([*arguments, str(tmp_path / "own"), "--product", "Ascend310P"]) == 0
    capsys.readouterr()
    lint = ["lint", "--product", "Ascend310P"]
    assert cli.main([*lint, str(tmp_path / "own_deploy_model.onnx")]) == 0
    assert cli.main([*lint, str(tmp_path / "all_deploy_model.onnx")]) == 1
    assert "Ascend310P has no AscendAntiQuant" in capsys.readouterr().out
    assert cli.main([*lint, "--for", "tensorrt", str(tmp_path / "qat.onnx")]) == 2
    assert "--product names an Ascend product" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["convert", "no.onnx", "--to", "cann", "--out", "o"],
            "must be an ONNX model at 'no.onnx'",
        ),
        (["convert", "no.onnx", "--to", "can", "--out", "o"], "No exporter named 'can'"),
        (["run", "no.onnx", "--inputs", "i", "--out", "o"], "with the inputs at 'i'; no file"),
        (["lint", "no.onnx"], "must be an ONNX model at 'no.onnx'"),
    ],
)
def test_errors_are_one_message_without_a_traceback(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    "arguments", [[], ["convert", "a.onnx"], ["lint"], ["run", "a"], ["train"]]
)
def test_bad_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: lightning-qat" in capsys.readouterr().err


def test_help_shows_a_command_to_copy(capsys: pytest.CaptureFixture[str]) -> None:
    for command, line in (
        ("convert", "lightning-qat convert model_qat.onnx --to cann --out results/model"),
        ("lint", "lightning-qat lint results/model_deploy_model.onnx"),
        ("run", "lightning-qat run results/model_deploy_model.onnx --inputs in.npz --out out.npz"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0
        assert line in capsys.readouterr().out
