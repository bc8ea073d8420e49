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
        "must call operators of torch",
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

    with pytest.raises(ValueError, match=r"holds '.*model\.so', which no converted model has"):
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


def test_a_model_of_our_own_passes(saved: Path) -> None:
    loaded = QuantizedModel.load(saved)
    x = torch.randn(3, 6)
    assert set(loaded(x)) == {"rows", "all of it"}
    assert loaded(x)["rows"].shape == (6, 4)
