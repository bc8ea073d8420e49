"""The configuration of LightningCLI as ``--config`` reads it: what is wrong is named, by key."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_qat.cli.module_class import LightningConfig, plain_arguments
from tests.cli.conftest import Command
from tests.plain_data.test_parse_yaml import LAUGHS


def test_what_is_read_of_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "fit:\n"
        "  model: {class_path: a.Net, init_args: {weights: {0: 1.5}}}\n"
        "  data:\n"
        "  trainer:\n"
        "    callbacks:\n"
        "    - lightning.pytorch.callbacks.RichProgressBar\n"
        "    - class_path: lightning_qat.QATCallback\n"
        "      init_args: {recipe: int8}\n"
    )
    config = LightningConfig(path)
    assert (config.class_path, config.data_class_path) == ("a.Net", None)
    assert config.quantization == {"recipe": "int8"}


@pytest.mark.parametrize("callbacks", ["null", "false", "a.B", "{class_path: a.B}", "[{}]"])
def test_other_callbacks_say_nothing_of_quantization(tmp_path: Path, callbacks: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"model: {{}}\ntrainer: {{callbacks: {callbacks}}}\n")
    assert LightningConfig(path).quantization == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "must be a configuration of LightningCLI, with the key 'model'"),
        ("model: 3", "must be a configuration of LightningCLI, with the key 'model'"),
        ("model: {class_path: [a]}", "['model']['class_path'] must be a text or null"),
        ("model: {init_args: 3}", "['model']['init_args'] must be a mapping or null; got 3"),
        ("model: {}\ndata: [1]", "['data'] must be a mapping or null; got [1]"),
        ("model: {}\ntrainer: 3", "['trainer'] must be a mapping or null; got 3"),
        ("model: {}\ntrainer: {callbacks: [3]}", "['trainer']['callbacks'][0] must be"),
        ("model: {a: 1, a: 2}", "line 1: a key must come once in its mapping"),
        ("model: !!python/name:os.system", "must be plain, without a tag"),
        (LAUGHS, "at most 300,000 values"),
        ("[" * 5000, "nested at most 50 deep"),
        ("model: {", "neither JSON nor YAML"),
    ],
)
def test_a_bad_configuration_is_one_message(
    command: Command, checkpoint: Path, tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    to = ("--to", "fake_quant_onnx", "--out", tmp_path / "out")
    code, _, err = command("export", checkpoint, "--config", path, *to)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("given", ["3", "[1]", "{0: 1}", "{a: 1, a: 2}", "{a: !!python/x 1}", "{"])
def test_arguments_that_are_no_names_with_plain_values_are_refused(given: str) -> None:
    with pytest.raises(ValueError, match=r"--init-args must be|neither JSON nor YAML"):
        plain_arguments(given)
