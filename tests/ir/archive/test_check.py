"""A converted model from elsewhere runs no code; each attack does, where nothing is checked."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_qat import QuantizedModel, convert, prepare

Content = dict[str, bytes]


class Doubled(nn.Module):
    """Has symbolic sizes that are computed, a dictionary and names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"a-b c": nn.Linear(6, 4)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.layers["a-b c"](x)
        return {"rows": torch.cat((y, y)), "all of it": y.reshape(-1, 2)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    x = torch.randn(4, 6)
    model = Doubled()
    prepare(model, "int8", x)
    model.train()(x)
    path = tmp_path_factory.mktemp("saved") / "net.pt2"
    convert(model.eval(), x).save(path)
    return path


class Planted:
    """Unpickling it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def changed(source: Path, target: Path, change: Callable[[Content], None]) -> Path:
    """A copy of an archive with other contents."""
    with zipfile.ZipFile(source) as archive:
        root = archive.namelist()[0].partition("/")[0]
        content = {n.partition("/")[2]: archive.read(n) for n in archive.namelist()}
    change(content)
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in content.items():
            archive.writestr(f"{root}/{name}", data)
    return target


def in_json(name: str, change: Callable[[Any], None]) -> Callable[[Content], None]:
    def apply(content: Content) -> None:
        values = json.loads(content[name])
        change(values)
        content[name] = json.dumps(values).encode()

    return apply


def everywhere(values: Any, field: str, text: Any) -> None:
    """Set a field wherever it occurs."""
    for key, value in list(values.items() if isinstance(values, dict) else enumerate(values)):
        if key == field:
            values[key] = text
        elif isinstance(value, dict | list):
            everywhere(value, field, text)


def torch_saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def nested(text: str, innermost: str, levels: int) -> str:
    for _ in range(levels):
        innermost = text.format(innermost)
    return innermost


def expression(mark: Path) -> str:
    return f"open({str(mark)!r}, 'w').close() or Integer(4)"


ATTACKS: dict[str, Callable[[Path], Callable[[Content], None]]] = {
    "a pickle among the inputs": lambda mark: (
        lambda content: content.update(
            {"data/sample_inputs/model.pt": torch_saved(((Planted(mark),), {}))}
        )
    ),
    "a size that is code": lambda mark: in_json(
        "models/model.json", lambda values: everywhere(values, "expr_str", expression(mark))
    ),
    "a guard that is code": lambda mark: in_json(
        "models/model.json",
        lambda values: values.update(guards_code=[f"not open({str(mark)!r}, 'w').close()"]),
    ),
    "a pickled weight": lambda mark: (
        lambda content: (
            (
                content.update({"data/weights/weight_0": torch_saved(Planted(mark))}),
                in_json(
                    "data/weights/model_weights_config.json",
                    lambda values: next(
                        entry
                        for entry in values["config"].values()
                        if entry["path_name"] == "weight_0"
                    ).update(use_pickle=True),
                )(content),
            )
            and None
        )
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_code_in_a_file_is_refused_and_not_run(attack: str, saved: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    path = changed(saved, tmp_path / "evil.pt2", ATTACKS[attack](mark))
    with pytest.raises(ValueError, match=r"evil\.pt2' is not a model that QuantizedModel.save"):
        QuantizedModel.load(path)
    assert not mark.exists()
    # It does run where the file is trusted.
    try:
        QuantizedModel.load(path, trust=True)(torch.randn(4, 6))
    except Exception:  # whatever comes after the code
        pass
    assert mark.exists()


REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    "an operator that reads files": (
        lambda v: everywhere(v, "target", "torch.ops.aten.from_file.default"),
        "must call operators of torch that compute",
    ),
    "an operator that writes files": (
        lambda v: everywhere(v, "target", "torch.ops.aten.save.default"),
        "must call operators of torch that compute",
    ),
    "an operator of torchvision that writes files": (
        lambda v: everywhere(v, "target", "torch.ops.torchvision.write_file.default"),
        "must call operators of torch that compute",
    ),
    "a set of operators, which is called as Python": (
        lambda v: everywhere(v, "target", "torch.ops.aten.relu"),
        "must call operators of torch that compute",
    ),
    "a method of torch's namespace": (
        lambda v: everywhere(v, "target", "torch.ops.aten.__setattr__"),
        "must call operators of torch that compute",
    ),
    "an operator that points to other memory": (
        lambda v: everywhere(v, "target", "torch.ops.aten.set_.source_Tensor"),
        "must call operators of torch that compute",
    ),
    "a function of Python": (
        lambda v: everywhere(v, "target", "torch.load"),
        "must call operators of torch",
    ),
    "an attribute getter": (
        lambda v: everywhere(v, "target", "_operator.methodcaller"),
        "must call operators of torch",
    ),
    "a name that is source": (
        lambda v: everywhere(v, "name", "x, y=print(1)"),
        "must be an identifier",
    ),
    "a parameter that is source": (
        lambda v: everywhere(v, "parameter_name", 'x", 0) or print("'),
        "'parameter_name' must hold no quotes",
    ),
    "an argument that is source": (
        lambda v: everywhere(v, "forward_arg_names", ["x=print(1)"]),
        "must be an identifier",
    ),
    "a tower of powers": (
        lambda v: everywhere(v, "expr_str", "Pow(Integer(9), Pow(Integer(9), Integer(9)))"),
        "must be arithmetic on symbols",
    ),
    "powers of powers": (
        lambda v: everywhere(v, "expr_str", nested("Pow({}, Integer(8))", "Integer(9)", 30)),
        "must be arithmetic on symbols",
    ),
    "a shift": (
        lambda v: everywhere(v, "expr_str", "LShift(Integer(1), Integer(4611686018427387904))"),
        "must be arithmetic on symbols",
    ),
    "a number of so many digits": (
        lambda v: everywhere(v, "expr_str", "Float(1.0, 1000000000)"),
        "must be arithmetic on symbols",
    ),
    "a product of sums": (
        lambda v: everywhere(
            v,
            "expr_str",
            nested("Mul({}, Add(Symbol('s0'), Symbol('s1')))", "Symbol('s2')", 40),
        ),
        "must be arithmetic on symbols",
    ),
    "powers as an operator": (
        lambda v: everywhere(v, "expr_str", "9**9**9"),
        "must be arithmetic on symbols",
    ),
    "deep brackets": (
        lambda v: everywhere(v, "expr_str", "(" * 9000),
        "must be arithmetic on symbols",
    ),
    "an attribute of a symbol": (
        lambda v: everywhere(v, "expr_str", "Symbol('s0').__class__"),
        "must be arithmetic on symbols",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_converted_model_has_is_refused(what: str, saved: Path, tmp_path: Path) -> None:
    change, text = REFUSED[what]
    path = changed(saved, tmp_path / "evil.pt2", in_json("models/model.json", change))
    with pytest.raises(ValueError, match=text):
        QuantizedModel.load(path)


def test_a_library_in_the_archive_is_refused(saved: Path, tmp_path: Path) -> None:
    def add(content: Content) -> None:
        content["data/aotinductor/model/model.so"] = b"\x7fELF"

    with pytest.raises(ValueError, match=r"holds 'data/.*model\.so', which no converted model has"):
        QuantizedModel.load(changed(saved, tmp_path / "evil.pt2", add))


def test_a_pickle_of_an_opaque_constant_is_refused(saved: Path, tmp_path: Path) -> None:
    def add(content: Content) -> None:
        content["data/constants/custom_obj_0"] = pickle.dumps(Planted(tmp_path / "mark"))

    with pytest.raises(ValueError, match="custom_obj_0', which no converted model has"):
        QuantizedModel.load(changed(saved, tmp_path / "evil.pt2", add))


def test_a_compressed_part_is_refused(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt2"
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="must be stored as it is; it is compressed"):
        QuantizedModel.load(path)


@pytest.mark.parametrize("first", ["other/models/model.json", "net/MODELS/model.json"])
def test_a_part_that_torch_finds_and_a_check_does_not_is_refused(
    first: str, saved: Path, tmp_path: Path
) -> None:
    # torch looks below the folder of the first part, and for names in any case.
    path = tmp_path / "two.pt2"
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w") as new:
        new.writestr(first, b"evil")
        for name in old.namelist():
            new.writestr(f"net/{name.partition('/')[2]}", old.read(name))
    with pytest.raises(ValueError, match=r"must lie in one folder|holds .* twice"):
        QuantizedModel.load(path)


def sizes_of(name: str, sizes: list[int], strides: list[int]) -> Callable[[Content], None]:
    """Let every tensor of a table claim a size."""

    def change(values: Any) -> None:
        for entry in values["config"].values():
            entry["tensor_meta"]["sizes"] = [{"as_int": n} for n in sizes]
            entry["tensor_meta"]["strides"] = [{"as_int": n} for n in strides]

    return in_json(f"data/{name}/model_{name}_config.json", change)


@pytest.mark.parametrize("strides", [[2**20, 1], [0, 0]])
def test_a_weight_that_claims_more_than_is_stored_is_refused(
    strides: list[int], saved: Path, tmp_path: Path
) -> None:
    change = sizes_of("weights", [2**20, 2**20], strides)
    with pytest.raises(ValueError, match=r"claims 1099511627776 numbers; \d+ bytes are stored"):
        QuantizedModel.load(changed(saved, tmp_path / "evil.pt2", change))


def test_a_weight_without_its_numbers_is_refused(saved: Path, tmp_path: Path) -> None:
    def empty(content: Content) -> None:
        content["data/weights/weight_0"] = b""

    with pytest.raises(ValueError, match=r"claims \d+ numbers; 0 bytes are stored of it"):
        QuantizedModel.load(changed(saved, tmp_path / "evil.pt2", empty))


def test_inputs_that_unpack_to_more_than_the_file_are_refused(saved: Path, tmp_path: Path) -> None:
    inputs = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(torch_saved(((torch.zeros(1000),), {})))) as old,
        zipfile.ZipFile(inputs, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))

    def bomb(content: Content) -> None:
        content["data/sample_inputs/model.pt"] = inputs.getvalue()

    with pytest.raises(ValueError, match=r"sample_inputs/model\.pt.* it is compressed"):
        QuantizedModel.load(changed(saved, tmp_path / "evil.pt2", bomb))


DAMAGED: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "no list of operators": (
        "models/model.json",
        lambda v: v["graph_module"].update(graph=None),
        "AttributeError|TypeError",
    ),
    "a node that reads what is not there": (
        "models/model.json",
        lambda v: everywhere(v["graph_module"]["graph"]["nodes"], "as_tensor", {"name": "gone"}),
        "SerializeError: Failed deserializing node",
    ),
    "a schema of another major version": (
        "models/model.json",
        lambda v: v["schema_version"].update(major=99),
        "does not match our current schema version",
    ),
    "a facts file without a version": (
        "extra/lightning_qat.json",
        lambda v: v.pop("format_version"),
        "must hold a table with a format_version",
    ),
    "names that are numbers": (
        "extra/lightning_qat.json",
        lambda v: v.update(input_names=[1]),
        "'input_names' must be a list of names",
    ),
    "too few names": (
        "extra/lightning_qat.json",
        lambda v: v.update(output_names=[]),
        "a name for each of its 2 outputs",
    ),
    "a recurrence of no kind": (
        "extra/lightning_qat.json",
        lambda v: v.update(recurrences=[{"name": "rnn", "kind": "RNN", "initial_cells": []}]),
        "must list layers with a name, initial cells and a kind",
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_is_one_kind_of_error_and_no_log(
    what: str, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    part, change, text = DAMAGED[what]
    path = changed(saved, tmp_path / "damaged.pt2", in_json(part, change))
    with pytest.raises(ValueError, match=rf"is not a model that QuantizedModel\.save.*({text})"):
        QuantizedModel.load(path)
    assert not caplog.records


def test_a_model_of_our_own_passes(saved: Path) -> None:
    loaded = QuantizedModel.load(saved)
    x = torch.randn(3, 6)
    assert set(loaded(x)) == {"rows", "all of it"}
    assert loaded(x)["rows"].shape == (6, 4)
