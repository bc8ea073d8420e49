"""A record file is read back, and a float model takes its factors to the bit."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_qat import convert, convert_qat_model, export, prepare
from lightning_qat.amct.apply_record import apply_record
from lightning_qat.amct.layer_record import LayerRecord
from lightning_qat.amct.record import encode_record, format_record, read_record
from lightning_qat.recipe.recipe import Recipe
from lightning_qat_exporters import FakeQuantOnnxExporter
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

    with pytest.raises(ValueError, match=r"layer '7' must be a module of the model; it is none"):
        apply_record(network(), [entry("7", 0.1)], x)
    with pytest.raises(ValueError, match=r"'0': .*one per output channel \(6\); it has 5"):
        apply_record(network(), [entry("0", *[0.1] * 5)], x)
    with pytest.raises(ValueError, match=r"'0': wts_type must be one of .*; got 'INT3'"):
        apply_record(network(), [entry("0", 0.1, wts_type="INT3")], x)
    hidden = entry("0", 0.1, scale_h=0.1, offset_h=0, scale_r=(0.1,))
    with pytest.raises(ValueError, match=r"'0' must have scale_h.*if it is an LSTM.*is a Conv2d"):
        apply_record(network(), [hidden], x)
    with pytest.raises(ValueError, match=r"'2' must have a weight; ReLU has none"):
        apply_record(network(), [entry("2", 0.1)], x)


def test_a_record_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"record file at .*; no file is there"):
        read_record(tmp_path / "record.txt")
    (tmp_path / "binary").write_bytes(b"\x0a\xff\xfe\x80")
    with pytest.raises(ValueError, match=r"as protobuf text or binary; .* is neither"):
        read_record(tmp_path / "binary")


# Field numbers and types of scale_offset_record_pytorch.proto (hicann/amct), encoded by hand: a tag
# is 8 * number + 0 for a varint, 2 for what has a length, 5 for 32 bits.
VALUE = bytes.fromhex(
    "0d 00 00 00 3f"  # scale_d = 1, 0.5
    "10 80 ff ff ff ff ff ff ff ff 01"  # offset_d = 2, -128
    "1d 00 00 80 3e 1d 00 00 00 3e"  # scale_w = 3, 0.25 and 0.125, one by one as in proto2
    "20 00 20 00"  # offset_w = 4
    "5a 05 49 4e 54 31 36"  # act_type = 11, "INT16"
    "62 04 49 4e 54 38"  # wts_type = 12, "INT8"
    "ad 01 00 00 80 3f"  # scale_h = 21, 1
    "b0 01 03"  # offset_h = 22, 3
    "bd 01 00 00 00 40"  # scale_r = 23, 2
    "c0 01 00"  # offset_r = 24
)
RECORD = LayerRecord("fc", 0.5, -128, (0.25, 0.125), "INT16", "INT8", 1.0, 3, (2.0,))


def file_of(value: bytes) -> bytes:
    """record = 1 with key = 1, "fc", and value = 2."""
    entry = bytes.fromhex("0a 02 66 63") + bytes([0x12, len(value)]) + value
    return bytes([0x0A, len(entry)]) + entry


def test_the_binary_form_has_amcts_field_numbers(tmp_path: Path) -> None:
    assert encode_record([RECORD]) == file_of(VALUE)
    (tmp_path / "record.pb").write_bytes(file_of(VALUE))
    assert read_record(tmp_path / "record.pb") == (RECORD,)


@pytest.mark.parametrize("begin", ["", "\n", "\n\n  # comment\n"])
def test_text_may_begin_with_empty_lines(begin: str, tmp_path: Path) -> None:
    (tmp_path / "record.txt").write_text(begin + format_record([RECORD]))
    assert read_record(tmp_path / "record.txt") == (RECORD,)


def test_a_binary_record_of_other_tools_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "record.pb"
    # skip_fusion = 9 in the layer, prune_record = 2 in the file
    path.write_bytes(file_of(VALUE + bytes.fromhex("48 01")))
    with pytest.raises(
        ValueError, match=r"layer 'fc' has the fields number \[9\], of AMCT's other"
    ):
        read_record(path)
    path.write_bytes(file_of(VALUE) + bytes.fromhex("12 00"))
    with pytest.raises(ValueError, match=r"the file has the fields number \[2\]"):
        read_record(path)


def test_a_conversion_writes_a_binary_record_by_its_name(tmp_path: Path) -> None:
    x = torch.randn(4, 3, 4, 4)
    net = network()
    prepare(net, Recipe(joins=False, outputs=False))
    train_steps(net, x)
    model = convert(net, x)
    text = read_record(export(model, "cann", tmp_path / "net").files["record"])
    qdq = export(model, FakeQuantOnnxExporter(activation_type="int8"), tmp_path / "qdq")
    convert_qat_model(qdq.files["model"], tmp_path / "again", tmp_path / "record.pb")
    assert (tmp_path / "record.pb").read_bytes() == encode_record(text)
    assert read_record(tmp_path / "record.pb") == text
