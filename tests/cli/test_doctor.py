"""``lightning-qat doctor``: what is there, what is not, and what to install."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from lightning_qat.cli.commands import doctor
from lightning_qat.export import load
from lightning_qat.export.protocol import MissingDependency
from tests.cli.conftest import Command


def test_packages_targets_and_devices_are_listed(command: Command) -> None:
    done = command("doctor", "--json")
    assert done.code == 0
    found = {check["name"]: check for check in done.json}
    assert found["click"]["found"] == metadata.version("click")
    assert {n for n, c in found.items() if c["kind"] == "target"} >= {"cann", "fake_quant_onnx"}
    assert found["cann"]["works"]
    assert "reference executor" in found["cann"]["found"]
    assert found["cpu"]["found"].startswith(("compiled loops", "operations of torch; install gcc"))


def test_a_target_that_does_not_work_says_what_to_install(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> Any:
        raise MissingDependency(f"{name} needs: pip install it.")

    monkeypatch.setattr(load, "load_exporter", refuse)
    monkeypatch.setattr(doctor, "version", raising)
    code, out, _ = command("doctor")
    assert code == 0
    lines = {tuple(line.split()[:2]): line for line in out.splitlines()}
    assert lines["target", "tflite"].endswith("no     tflite needs: pip install it.")
    assert "not installed; to verify QDQ files in it" in lines["package", "openvino"]
    assert "not installed; pip install torch" in lines["package", "torch"]


def raising(package: str) -> str:
    raise metadata.PackageNotFoundError(package)


def test_vector_instructions_are_read_of_the_cpu(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    assert doctor._cpu_flags(path) is None
    path.write_text("flags\t: fpu avx2 avx512f avx512_vnni\n")
    assert doctor._cpu_flags(path) == ["avx2", "avx512f", "avx512_vnni"]
