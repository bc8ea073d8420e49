"""An exporter of somebody else's: a package of its own, found through its entry point alone.

The package in ``PACKAGE`` is what CONTRIBUTING asks for, and nothing more.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import pytest

from lightning_qat import QATCallback, export, verify
from lightning_qat.export.load import load_exporter
from lightning_qat.export.protocol import Artifact, Exporter
from tests.callback.tiny import SHORT, Net
from tests.exporters.contract import ExporterContract, converted
from tests.tiny_module import random_loader

PACKAGE = '''
"""Writes the integers and scales of a converted model as JSON."""

import json

from lightning_qat.atomic_write import replacing
from lightning_qat.export.protocol import Artifact


class ToyExporter:
    name = "toy"

    def check_available(self):
        """It needs no package."""

    def export(self, model, path_prefix):
        tensors = {
            key: {
                "scale": tensor.qparams.scale.tolist(),
                "zero_point": tensor.qparams.zero_point.tolist(),
                "integers": None if tensor.integers is None else tensor.integers.tolist(),
            }
            for key, tensor in model.tensors.items()
        }
        layers = [
            {"name": layer.name, "input": layer.input_key, "weight": layer.weight_key}
            for layer in model.layers
        ]
        path = path_prefix.with_name(f"{path_prefix.name}_toy.json")
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({"tensors": tensors, "layers": layers}))
        return Artifact(self.name, {"model": path})
'''

ENTRY_POINTS = """
[lightning_qat.exporters]
toy = toy_exporter:ToyExporter
"""

METADATA = "Metadata-Version: 2.1\nName: toy-exporter\nVersion: 1.0\n"


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The package as ``pip install`` would leave it, in a folder that Python searches."""
    site = tmp_path_factory.mktemp("site")
    information = site / "toy_exporter-1.0.dist-info"
    information.mkdir()
    (site / "toy_exporter.py").write_text(PACKAGE, encoding="utf-8")
    (information / "entry_points.txt").write_text(ENTRY_POINTS, encoding="utf-8")
    (information / "METADATA").write_text(METADATA, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        yield
    sys.modules.pop("toy_exporter", None)


def toy() -> Exporter:
    made: Exporter = importlib.import_module("toy_exporter").ToyExporter()
    return made


class TestContract(ExporterContract):
    name = "toy"
    make = toy
    readable = False
    runnable = False

    def break_write(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def half(path: Path, text: str) -> None:
            path.write_bytes(text.encode()[:10])
            raise OSError("disk full")

        monkeypatch.setattr(Path, "write_text", half)

    def names_in(self, artifact: Artifact) -> set[str]:
        layers = json.loads(artifact.files["model"].read_text(encoding="utf-8"))["layers"]
        return {layer["name"] for layer in layers}


def test_it_is_found_by_name_and_writes_the_model_s_numbers(tmp_path: Path) -> None:
    model = converted("linear")
    artifact = export(model, "toy", tmp_path / "net")
    written = json.loads((tmp_path / "net_toy.json").read_text(encoding="utf-8"))
    assert artifact.files == {"model": tmp_path / "net_toy.json"}
    assert written["tensors"].keys() == model.tensors.keys()
    for key, tensor in model.tensors.items():
        assert written["tensors"][key]["scale"] == tensor.qparams.scale.tolist()
    assert verify(model, artifact).target == "toy"


def test_a_wrong_name_lists_it_among_the_installed() -> None:
    with pytest.raises(ValueError, match=r"closest names: 'toy'.*Installed exporters: .*'toy'"):
        load_exporter("toi")


def test_a_training_run_exports_to_it(tmp_path: Path) -> None:
    callback = QATCallback("int8", SHORT, exporters=["toy"], export_dir=tmp_path)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(), random_loader())
    target = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))["targets"]["toy"]
    assert (tmp_path / target["files"]["model"]["path"]).is_file()
    assert target["agreement"]["parameter_differences"] is None
