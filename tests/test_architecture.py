"""The floors: who may import whom. This list is also the map of the package."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FLOORS = [
    # the words that recipes are spelled with, for command lines; AMCT's text as plain data
    {"recipe_keys", "spelling", "amct_cfg"},
    {"amct_config", "patterns"},  # AMCT's configurations as recipes; what patterns select
    # relu's calls, and who reads what they give; compiled loops; where in a forward a call stands
    {"relus", "kernels", "places"},
    {
        "qparams",
        "bits",
        "recipe",
        "schedule",
        "atomic",
        "program",
        "tape",
        "one_call",
        "compiled",
        "findings",
        "record",
    },  # 0 vocabulary
    {"arithmetic", "join_functions", "codes", "ranges"},  # 1 what quantization is: pure functions
    # 1a the hot path; what backward keeps of other functions; what a call is given
    {"fake_quantization", "compact", "operands"},
    # 2 for batch norms, graphs, functional calls, ranges, steps that learn
    {"batchnorm", "nodes", "interception", "observers", "learned", "live_onnx", "kept_weights"},
    {"quantized_model", "fold", "quantizers"},  # 3 final numbers; what finds them in training
    {"learned_quantizers"},  # 3a those that are parameters
    {"export", "layers", "phases", "input_recorder", "join_plan"},  # 4 layers, phases, the plan
    {"dry_run"},  # 4a what one run of a model tells
    # 5 agreement; models of other tools; the plan is found by running; what a checkpoint says;
    # a Trainer's surroundings
    {"verify", "qat_model", "discovery", "checkpoint_checks", "callback_checks", "run_length"},
    {"prepare", "convert", "cli"},  # 6 model surgery and capture; the command line
    # 7 every target and its manifest; checkpoints without a trainer; factors trained elsewhere; the
    # door for AMCT's scripts
    {"amct", "delivery", "checkpoint", "apply_record"},
    {"callback_export"},  # 8 the end of fit
    {"callback"},  # 9 the door to Lightning
]
OPEN_TO_EXPORTERS = {
    *{
        "qparams",
        "arithmetic",
        "fake_quantization",
        "quantized_model",
        "export",
        "verify",
        "atomic",
    },
    *{"program", "nodes"},  # what a converted model's graph is made of
    *{"qat_model", "findings", "record"},  # what the doors beside training hand over
}
# The callback in four ideas: its hooks, what it refuses, how long a run is, the end of fit.
LIGHTNING_DOOR = {"callback", "callback_checks", "run_length", "callback_export"}
LIGHTNING = {"lightning", "pytorch_lightning"}
FORMATS = {"onnx", "onnx_ir", "onnxscript", "onnxruntime", "tinynn", "litert_torch"}

FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
ROOT = Path(__file__).parents[1]
FACADE = ROOT / "lightning_qat/__init__.py"
CORE = sorted(set((ROOT / "lightning_qat").rglob("*.py")) - {FACADE})
EXPORTERS = sorted((ROOT / "exporters").rglob("*.py"))


def module_of(file: Path) -> str:
    return file.relative_to(ROOT / "lightning_qat").parts[0].removesuffix(".py")


def imports(source: str) -> Iterator[tuple[str, str]]:
    """Every import, also inside functions, as (package, module of that package or '')."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
        for package, _, rest in (name.partition(".") for name in names):
            yield package, rest.partition(".")[0]


def violations(module: str, source: str) -> list[str]:
    """What a core module, or an exporter (module ``'exporter'``), imports against the rules."""
    if module == "exporter":
        allowed, banned = OPEN_TO_EXPORTERS, LIGHTNING
    else:
        allowed = {name for name, floor in FLOOR.items() if floor < FLOOR[module]}
        allowed |= {module} & {"layers"}
        banned = FORMATS | {"lightning_qat_exporters"}
        banned |= set() if module in LIGHTNING_DOOR else LIGHTNING
    return [
        f"{module} imports {package}.{name}".rstrip(".")
        for package, name in imports(source)
        if package in {"", *banned} or (package == "lightning_qat" and name not in allowed)
    ]


def test_every_module_has_a_floor() -> None:
    assert {module_of(file) for file in CORE} == set(FLOOR)


@pytest.mark.parametrize("file", CORE, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_module_imports_only_from_floors_below(file: Path) -> None:
    assert violations(module_of(file), file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("file", EXPORTERS, ids=lambda p: p.name)
def test_an_exporter_sees_only_the_neutral_description(file: Path) -> None:
    assert violations("exporter", file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("arithmetic", "from lightning_qat.layers import Conv2dQAT"),
        ("qparams", "import lightning_qat.prepare"),
        ("convert", "from lightning_qat import prepare"),
        ("prepare", "from lightning_qat.convert import convert"),
        ("quantizers", "from lightning_qat import Recipe"),
        ("layers", "from . import conv"),
        ("verify", "def run():\n    import onnxruntime as ort"),
        ("export", "def load():\n    from lightning_qat_exporters.cann import CannExporter"),
        ("checkpoint", "import lightning.pytorch as pl"),
        ("exporter", "from lightning_qat.layers.conv import Conv2dQAT"),
    ],
)
def test_a_wrong_import_is_caught(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("callback", "import lightning.pytorch as pl\nfrom lightning_qat.prepare import prepare"),
        ("layers", "import torch\nfrom lightning_qat.layers.conv import Conv2dQAT"),
        ("exporter", "import onnx\nfrom lightning_qat.quantized_model import QuantizedModel"),
    ],
)
def test_a_right_import_is_not_caught(module: str, source: str) -> None:
    assert violations(module, source) == []


def formats_loaded_by(statement: str) -> set[str]:
    """The file format libraries that a fresh interpreter has loaded after ``statement``."""
    code = f"{statement}\nimport sys\nprint(*{FORMATS} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_no_file_format() -> None:
    assert formats_loaded_by("import lightning_qat") == set()


def test_a_loaded_file_format_is_seen() -> None:
    assert "onnx" in formats_loaded_by("import onnx")
