"""A record file is read back, and a float model takes its factors to the bit."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_qat import convert, export, prepare
from lightning_qat.apply_record import apply_record
from lightning_qat.recipe import Recipe
from lightning_qat.record import LayerRecord, read_record
from tests.join_networks import train_steps


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, 2),
        nn.Flatten(),
        nn.Linear(4 * 8 * 8, 5),
    )


def test_a_float_model_with_a_record_exports_the_same_deploy_file(tmp_path: Path) -> None:
    x = torch.randn(4, 3, 4, 4)
    trained = network()
    prepare(trained, Recipe(joins=False, outputs=False))
    train_steps(trained, x)
    first = export(convert(trained, x), "cann", tmp_path / "trained")

    plain = network()
    plain.load_state_dict(
        {k: v for k, v in trained.state_dict().items() if "quantizer" not in k and "_qat" not in k}
    )
    apply_record(plain.eval(), read_record(first.files["record"]), x)
    second = export(convert(plain, x), "cann", tmp_path / "applied")
    for role in ("model", "fake_quant", "record"):
        assert second.files[role].read_bytes() == first.files[role].read_bytes()


def test_a_record_that_does_not_fit_the_model_is_refused() -> None:
    x = torch.randn(1, 3, 4, 4)

    def entry(name: str, *scales: float, **changes: object) -> LayerRecord:
        return LayerRecord(name, 0.1, 0, scales, **changes)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=r"must be a module of the model; '7' is none"):
        apply_record(network(), [entry("7", 0.1)], x)
    with pytest.raises(ValueError, match=r"one per output channel \(6\); '0' has 5"):
        apply_record(network(), [entry("0", *[0.1] * 5)], x)
    with pytest.raises(ValueError, match=r"Types must be among .*; '0' has 'INT3'"):
        apply_record(network(), [entry("0", 0.1, wts_type="INT3")], x)
    with pytest.raises(ValueError, match=r"'0' has scale_h"):
        apply_record(network(), [entry("0", 0.1, scale_h=0.1)], x)
    with pytest.raises(ValueError, match=r"must have a weight; '2' has none"):
        apply_record(network(), [entry("2", 0.1)], x)


def test_a_record_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"record file at .*; no file is there"):
        read_record(tmp_path / "record.txt")
    (tmp_path / "binary").write_bytes(b"\x0a\xff\xfe\x80")
    with pytest.raises(ValueError, match=r"is binary, and the field numbers"):
        read_record(tmp_path / "binary")
