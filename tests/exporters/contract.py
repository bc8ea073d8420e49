"""What every exporter must do. A test class per exporter inherits these tests.

An exporter with nothing but the ``Exporter`` protocol can pass. Two tests ask for more where it has
more, and a test class says which with ``readable`` and ``runnable``:

=====================  ============================================================================
protocol               what is asked for
=====================  ============================================================================
``Exporter``           found by name; writes exactly the files that it names, atomically, the same
                       bytes for the same model; leaves the model as it is; names layers
``Readable``           every scale, zero point and integer read back is the model's, also after the
                       files are written anew
``Runnable``           outputs of the most literal runtime are within ``most_steps`` output steps
=====================  ============================================================================

Without ``Readable`` and ``Runnable`` nothing proves that the files hold what was trained, and
``verify`` says so: ``parameter_differences`` is ``None`` and ``max_steps`` is NaN.
"""

import functools
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_qat.convert.convert import convert
from lightning_qat.export.export import export
from lightning_qat.export.load import load_exporter
from lightning_qat.export.protocol import Artifact, Exporter, Readable, Runnable
from lightning_qat.export.verify import verify
from lightning_qat.ir.quantized_model import QuantizedModel
from tests.models import EVERY_LAYER, NETWORKS, inputs_for, trained

KINDS = [*NETWORKS]


@functools.cache
def converted(network: str, recipe: str = "int8", samples: int = 4) -> QuantizedModel:
    """A converted network, the same one for every test: exporters leave it as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = inputs_for(network, samples)
        return convert(trained(NETWORKS[network][0](), x, EVERY_LAYER.get(recipe, recipe)), x)


def numbers(model: QuantizedModel) -> dict[str, Tensor]:
    """Every constant of a model, copied."""
    values = {**model.program.state_dict, **model.program.constants}
    return {name: value.clone() for name, value in values.items()}


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@functools.cache
def exported(make: Callable[[], Exporter], network: str, of_all: Path) -> Artifact:
    """A network's files as ``net`` in a folder of its own; read them, and copy them to change."""
    return export(converted(network), make(), of_all / network / "net")


class ExporterContract:
    """Inherit, and say which exporter, how far apart its runtimes may be, and how to break a write.

    Attributes:
        name: Of the entry point.
        make: The exporter.
        readable: Whether it has ``Readable``.
        runnable: Whether it has ``Runnable``.
        most_steps: Largest allowed difference of the most literal runtime, in output steps.
    """

    name: str
    make: Callable[[], Exporter]
    readable = True
    runnable = True
    most_steps = 1.0

    def break_write(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make the last write of a file fail half way."""
        raise NotImplementedError

    def names_in(self, artifact: Artifact) -> set[str]:
        """The names of compute nodes in the main file."""
        raise NotImplementedError

    def exporter(self) -> Exporter:
        return type(self).make()

    @pytest.fixture
    def kept(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The folder of the files that tests share."""
        return tmp_path_factory.getbasetemp() / f"kept_{self.name}"

    def exported(self, network: str, kept: Path) -> Artifact:
        return exported(type(self).make, network, kept)

    def test_it_is_found_by_its_name(self) -> None:
        assert type(load_exporter(self.name)) is type(self.exporter())
        assert self.exporter().name == self.name

    def test_what_it_needs_is_here(self) -> None:
        self.exporter().check_available()

    def test_it_has_the_protocols_that_are_claimed(self) -> None:
        exporter = self.exporter()
        assert isinstance(exporter, Exporter)
        assert isinstance(exporter, Readable) is self.readable
        assert isinstance(exporter, Runnable) is self.runnable

    @pytest.mark.parametrize("network", KINDS)
    def test_numbers_read_back_are_the_model_s_and_so_are_the_outputs(
        self, network: str, kept: Path
    ) -> None:
        exporter, model = self.exporter(), converted(network)
        artifact = self.exported(network, kept)
        agreement = verify(model, artifact, inputs_for(network, 16), exporter)
        assert agreement.parameter_differences == (() if self.readable else None)
        assert bool(agreement.runtimes) is self.runnable
        # Float operations in another order can flip one rounding, which is one step.
        assert not self.runnable or agreement.max_steps <= self.most_steps

    def test_the_files_are_where_it_was_told_and_are_the_ones_it_names(
        self, tmp_path: Path
    ) -> None:
        artifact = export(converted("linear"), self.exporter(), tmp_path / "deep" / "er" / "net")
        assert artifact.target == self.name
        found = set((tmp_path / "deep" / "er").iterdir())
        assert found == set(artifact.files.values())
        assert all(path.name.startswith("net") for path in found)

    def test_the_model_is_untouched(self, tmp_path: Path) -> None:
        model, x = converted("conv_bn_relu"), inputs_for("conv_bn_relu")
        before, output, code = numbers(model), model(x), model.program.graph_module.code
        export(model, self.exporter(), tmp_path / "net")
        after = numbers(model)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert model.program.graph_module.code == code
        assert torch.equal(model(x), output)

    def test_the_same_model_gives_the_same_bytes(self, kept: Path, tmp_path: Path) -> None:
        self.exported("residual_add", kept)
        export(converted("residual_add"), self.exporter(), tmp_path / "net")
        assert digests(tmp_path) == digests(kept / "residual_add")

    def test_a_saved_and_loaded_model_gives_the_same_bytes(
        self, kept: Path, tmp_path: Path
    ) -> None:
        self.exported("residual_add", kept)
        converted("residual_add").save(tmp_path / "model.pt2")
        loaded = QuantizedModel.load(tmp_path / "model.pt2")
        export(loaded, self.exporter(), tmp_path / "two" / "net")
        assert digests(tmp_path / "two") == digests(kept / "residual_add")

    def test_a_write_that_fails_leaves_the_old_files(
        self, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.exported("linear", kept)
        shutil.copytree(kept / "linear", tmp_path, dirs_exist_ok=True)
        before = digests(tmp_path)
        self.break_write(monkeypatch)
        with pytest.raises(OSError, match="disk full"):
            export(converted("linear", "w4a8"), self.exporter(), tmp_path / "net")
        assert digests(tmp_path) == before

    def test_a_new_file_takes_the_old_one_s_place(self, kept: Path, tmp_path: Path) -> None:
        exporter = self.exporter()
        self.exported("linear", kept)
        shutil.copytree(kept / "linear", tmp_path, dirs_exist_ok=True)
        model = converted("linear", "w4a8")
        artifact = export(model, exporter, tmp_path / "net")
        assert self.readable is isinstance(exporter, Readable)
        if isinstance(exporter, Readable):
            assert exporter.differences(model, artifact) == ()

    def test_compute_nodes_have_the_names_of_their_layers(self, kept: Path) -> None:
        artifact = self.exported("residual_add", kept)
        assert {"conv1", "conv2", "head"} <= self.names_in(artifact)
