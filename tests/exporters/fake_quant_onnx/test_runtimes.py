"""Why a runtime differs from the file, in words."""

import pytest

from lightning_qat_exporters import FakeQuantOnnxExporter
from lightning_qat_exporters.fake_quant_onnx import runtimes

LITERAL, OPTIMIZED, OPENVINO = "onnxruntime, no optimizations", "onnxruntime", "openvino"


@pytest.fixture(autouse=True)
def no_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "has_vnni", lambda: False)
    monkeypatch.setattr(runtimes, "has_openvino", lambda: False)


def test_saturating_products_are_explained_where_the_cpu_makes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert FakeQuantOnnxExporter().runtimes == (LITERAL, OPTIMIZED)
    (remark,) = FakeQuantOnnxExporter().explain({LITERAL: 0.5, OPTIMIZED: 5.0})
    assert remark.startswith("5 steps in the optimized session: this CPU has no VNNI")
    assert "set the session option session.x64quantprecision to 1" in remark
    assert remark.endswith("train with WeightSpec(bits=7).")
    assert FakeQuantOnnxExporter().explain({LITERAL: 0.5, OPTIMIZED: 1.0}) == ()
    assert FakeQuantOnnxExporter("int8").explain({LITERAL: 0.5, OPTIMIZED: 5.0}) == ()
    monkeypatch.setattr(runtimes, "has_vnni", lambda: True)
    assert FakeQuantOnnxExporter().explain({LITERAL: 0.5, OPTIMIZED: 5.0}) == ()


def test_openvino_is_a_runtime_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "has_openvino", lambda: True)
    assert FakeQuantOnnxExporter().runtimes == (LITERAL, OPTIMIZED, OPENVINO)


@pytest.mark.parametrize(
    ("exporter", "vnni", "causes"),
    [
        (FakeQuantOnnxExporter(), False, ["no VNNI"]),
        (FakeQuantOnnxExporter("int8"), True, ["concatenation of int8"]),
        (FakeQuantOnnxExporter("int8"), False, ["concatenation of int8", "no VNNI"]),
        (FakeQuantOnnxExporter("int8", for_runtime="openvino"), False, ["no VNNI"]),
        (FakeQuantOnnxExporter(opset=21), True, ["of 16 bits"]),
    ],
)
def test_openvino_s_differences_have_known_causes(
    exporter: FakeQuantOnnxExporter,
    vnni: bool,
    causes: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtimes, "has_vnni", lambda: vnni)
    (remark,) = exporter.explain({LITERAL: 0.0, OPTIMIZED: 0.0, OPENVINO: 44.0})
    assert remark.startswith("44 steps in OpenVINO. Known causes: ")
    known = ("concatenation of int8", "of 16 bits", "no VNNI")
    assert [cause for cause in known if cause in remark] == causes
    assert exporter.explain({LITERAL: 0.0, OPTIMIZED: 0.0, OPENVINO: 1.0}) == ()


def test_a_difference_without_a_known_cause_is_not_explained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtimes, "has_vnni", lambda: True)
    assert FakeQuantOnnxExporter().explain({LITERAL: 0.0, OPTIMIZED: 0.0, OPENVINO: 44.0}) == ()
