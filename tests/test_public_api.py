"""The public names exist, are documented, and are not hidden by a module of the same name."""

import importlib
import inspect
from types import ModuleType

import pytest

PACKAGES = [
    importlib.import_module(name)
    for name in ("lightning_qat", "lightning_qat.layers", "lightning_qat_exporters")
]
NAMES = [(package, name) for package in PACKAGES for name in package.__all__]


def ident(value: ModuleType | str) -> str:
    return value if isinstance(value, str) else value.__name__


@pytest.mark.parametrize("package", PACKAGES, ids=ident)
def test_all_names_something_and_nothing_twice(package: ModuleType) -> None:
    assert package.__all__
    assert len(set(package.__all__)) == len(package.__all__)


@pytest.mark.parametrize(("package", "name"), NAMES, ids=ident)
def test_a_public_name_can_be_imported_and_is_documented(package: ModuleType, name: str) -> None:
    public = getattr(package, name)
    assert not inspect.ismodule(public), f"{name} is the module, not what it holds"
    if inspect.isclass(public) or inspect.isroutine(public):
        doc = public.__dict__.get("__doc__") if inspect.isclass(public) else public.__doc__
        assert doc
        assert not doc.startswith(f"{name}("), "a dataclass without a docstring shows its signature"
