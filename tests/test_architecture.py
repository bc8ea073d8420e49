"""The rooms: who may import whom. These tables are the map that docs/architecture.md draws."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

CORE: Mapping[str, str] = {
    # Room (a folder, or a file beside them): the rooms it imports. A room stands above all of them.
    "work_folder": "",
    "atomic_write": "work_folder",
    "out_of_memory": "",
    "numerics": "",
    "plain_data": "",
    "recipe": "plain_data",
    "model": "",
    "torch_files": "model",
    "function_hooks": "numerics model ir",
    "ir": "numerics model torch_files atomic_write",
    "quantizers": "numerics recipe model function_hooks ir",
    "export": "out_of_memory numerics recipe model ir atomic_write work_folder",
    "layers": "numerics recipe model function_hooks quantizers",
    "training": "out_of_memory numerics recipe model function_hooks quantizers layers",
    "joins": "numerics recipe model function_hooks quantizers layers",
    "prepare": "out_of_memory recipe model quantizers layers training joins",
    "convert": "out_of_memory numerics recipe model function_hooks ir quantizers layers joins",
    "checkpoint": "recipe model torch_files quantizers layers prepare",
    "amct": (
        "numerics plain_data recipe model torch_files ir export quantizers layers prepare "
        "convert checkpoint atomic_write"
    ),
    "calibrate": "out_of_memory recipe model quantizers training prepare",
    "insight": (
        "out_of_memory numerics recipe model function_hooks ir quantizers export layers training "
        "joins prepare convert calibrate atomic_write plain_data"
    ),
    "report": "numerics model ir export prepare insight atomic_write plain_data",
    "callback": (
        "numerics recipe model torch_files function_hooks ir quantizers export layers training "
        "joins prepare convert checkpoint report atomic_write work_folder"
    ),
    "cli": (
        "numerics recipe model ir quantizers export convert checkpoint amct calibrate insight "
        "report callback plain_data"
    ),
}
EXPORTERS: Mapping[str, str] = {
    "quiet": "",
    "stored_bits": "",
    "onnx_files": "",
    "qdq": "onnx_files quiet",
    "fake_quant_onnx": "onnx_files qdq stored_bits",
    "cann": "onnx_files qdq stored_bits",
    "tflite": "quiet stored_bits",
}
OPEN_TO_EXPORTERS = {"numerics", "ir", "export", "atomic_write", "out_of_memory", "amct"}
"""What of the core exporters may import: final numbers, the converted model, records."""
LIGHTNING_DOOR = {"callback"}
LIGHTNING = {"lightning", "pytorch_lightning"}
FORMATS = {"onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "tinynn", "litert_torch"}

PACKAGES = {"lightning_qat": CORE, "lightning_qat_exporters": EXPORTERS}
ROOT = Path(__file__).parents[1]
FOLDERS = {
    "lightning_qat": ROOT / "lightning_qat",
    "lightning_qat_exporters": ROOT / "exporters/lightning_qat_exporters",
}


def modules(package: str) -> dict[str, Path]:
    """Every module below a package by its dotted name, but for the package's own door."""
    folder = FOLDERS[package]
    named = {
        ".".join(file.relative_to(folder).with_suffix("").parts).removesuffix(".__init__"): file
        for file in folder.rglob("*.py")
    }
    return {name: file for name, file in named.items() if name != "__init__"}


def imports(source: str) -> Iterator[str]:
    """Every name that is imported, also inside functions, dotted: ``package.module.name``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = f"{'.' * node.level}{node.module or ''}"
            yield from (f"{module}.{alias.name}" for alias in node.names)


def violations(package: str, room: str, source: str) -> list[str]:
    """What a module of a room imports against the rules."""
    allowed = {room, *PACKAGES[package][room].split()}
    banned = set() if room in LIGHTNING_DOOR else LIGHTNING
    if package == "lightning_qat":
        banned = banned | FORMATS | {"lightning_qat_exporters"}
    found = []
    for name in imports(source):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        wrong = top in {"", *banned}
        wrong |= top == package and target not in allowed
        wrong |= top == "lightning_qat" != package and target not in OPEN_TO_EXPORTERS
        if wrong:
            found.append(f"{package}.{room} imports {name}")
    return found


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Circles of modules that import each other, each as the path that closes it."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for other in sorted(graph.get(name, ())):
                walk(other, [*path, name])
            done.add(name)

    for name in sorted(graph):
        walk(name, [])
    return found


def module_graph(package: str) -> dict[str, set[str]]:
    """Which modules each module imports; a room's door hands names on and is left out."""
    known = {name: file for name, file in modules(package).items() if file.stem != "__init__"}
    graph: dict[str, set[str]] = {}
    for name, file in known.items():
        parts = [n.split(".")[1:] for n in imports(file.read_text("utf-8")) if "." in n]
        paths = {".".join(p[:end]) for p in parts for end in (len(p) - 1, len(p))}
        graph[name] = (paths & known.keys()) - {name}
    return graph


MODULES = [(package, name) for package in PACKAGES for name in modules(package)]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_is_a_room(package: str) -> None:
    assert {name.partition(".")[0] for name in modules(package)} == set(PACKAGES[package])


@pytest.mark.parametrize(("package", "name"), MODULES, ids=[".".join(m) for m in MODULES])
def test_a_module_imports_only_from_rooms_below(package: str, name: str) -> None:
    source = modules(package)[name].read_text(encoding="utf-8")
    assert violations(package, name.partition(".")[0], source) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_stand_on_floors(package: str) -> None:
    assert circles({room: set(below.split()) for room, below in PACKAGES[package].items()}) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_a_room_is_named_below_only_where_it_is_imported(package: str) -> None:
    used: dict[str, set[str]] = {room: set() for room in PACKAGES[package]}
    for name, file in modules(package).items():
        room = name.partition(".")[0]
        for imported in imports(file.read_text(encoding="utf-8")):
            top, _, rest = imported.partition(".")
            if top == package:
                used[room].add(rest.partition(".")[0])
    listed = {room: set(below.split()) for room, below in PACKAGES[package].items()}
    assert {room: names - {room} for room, names in used.items()} == listed


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    assert circles(module_graph(package)) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_room_says_what_it_is_in_one_sentence(package: str) -> None:
    for folder in (p.parent for p in FOLDERS[package].rglob("__init__.py")):
        sentence = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8")))
        assert sentence, f"{folder.relative_to(ROOT)}/__init__.py has no docstring"
        assert len(sentence.splitlines()[0]) > 20
        code = [file for file in folder.glob("*.py") if file.name != "__init__.py"]
        assert len(code) <= 14, f"{folder.relative_to(ROOT)} holds {len(code)} files"


def test_no_file_is_longer_than_450_lines() -> None:
    lengths = {
        f"{package}.{name}": len(file.read_text("utf-8").splitlines())
        for package in PACKAGES
        for name, file in modules(package).items()
    }
    assert {name: length for name, length in lengths.items() if length > 450} == {}


@pytest.mark.parametrize(
    ("package", "room", "source"),
    [
        ("lightning_qat", "numerics", "from lightning_qat.layers import Conv2dQAT"),
        ("lightning_qat", "recipe", "import lightning_qat.prepare"),
        ("lightning_qat", "convert", "from lightning_qat import prepare"),
        ("lightning_qat", "prepare", "from lightning_qat.convert.convert import convert"),
        ("lightning_qat", "quantizers", "from lightning_qat import Recipe"),
        ("lightning_qat", "layers", "from . import conv"),
        ("lightning_qat", "export", "def run():\n    import onnxruntime as ort"),
        ("lightning_qat", "export", "from lightning_qat_exporters.cann import CannExporter"),
        ("lightning_qat", "checkpoint", "import lightning.pytorch as pl"),
        ("lightning_qat_exporters", "cann", "from lightning_qat.layers.conv import Conv2dQAT"),
        ("lightning_qat_exporters", "cann", "import lightning.pytorch as pl"),
        ("lightning_qat_exporters", "qdq", "import lightning_qat_exporters.cann.exporter"),
    ],
)
def test_a_wrong_import_is_caught(package: str, room: str, source: str) -> None:
    assert len(violations(package, room, source)) == 1


@pytest.mark.parametrize(
    ("package", "room", "source"),
    [
        ("lightning_qat", "callback", "import lightning.pytorch as pl"),
        ("lightning_qat", "callback", "from lightning_qat.prepare.prepare import prepare"),
        (
            "lightning_qat",
            "layers",
            "import torch\nfrom lightning_qat.layers.conv import Conv2dQAT",
        ),
        ("lightning_qat_exporters", "cann", "import onnx"),
        ("lightning_qat_exporters", "qdq", "from lightning_qat.ir.ops import as_dequantize"),
    ],
)
def test_a_right_import_is_not_caught(package: str, room: str, source: str) -> None:
    assert violations(package, room, source) == []


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c", "a"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}}) == []


def room_sentence(package: str, room: str) -> str:
    """The first sentence of a room's docstring."""
    folder = FOLDERS[package] / room
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split())


def room_table(package: str) -> str:
    """The rooms of a package as docs/architecture.md shows them."""
    lines = ["| room | what it is | imports |", "|---|---|---|"]
    for room, below in PACKAGES[package].items():
        names = ", ".join(f"`{name}`" for name in below.split())
        lines.append(f"| `{room}` | {room_sentence(package, room)} | {names} |")
    return "\n".join(lines)


ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("package", PACKAGES)
def test_the_page_shows_the_rooms(package: str) -> None:
    # python -m tests.test_architecture writes the tables anew.
    assert f"<!-- rooms: {package} -->\n{room_table(package)}\n" in ARCHITECTURE


def test_every_path_on_the_page_exists() -> None:
    paths = re.findall(r"`((?:lightning_qat|exporters|tests)/[\w/.]*)`", ARCHITECTURE)
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []


def formats_loaded_by(statement: str) -> set[str]:
    """The file format libraries that a fresh interpreter has loaded after ``statement``."""
    code = f"{statement}\nimport sys\nprint(*{FORMATS} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_no_file_format() -> None:
    assert formats_loaded_by("import lightning_qat") == set()


def test_a_loaded_file_format_is_seen() -> None:
    assert "onnx" in formats_loaded_by("import onnx")


if __name__ == "__main__":
    page = ARCHITECTURE
    for name in PACKAGES:
        marker = f"<!-- rooms: {name} -->\n"
        before, after = page.split(marker)
        rest = re.sub(r"\A(\|.*\n)*", "", after)
        page = f"{before}{marker}{room_table(name)}\n{rest}"
    (ROOT / "docs/architecture.md").write_text(page, encoding="utf-8")
