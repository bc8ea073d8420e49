"""Refuse a ``.pt2`` file that could run code when torch loads it or when its model runs.

``torch.export.load`` trusts its file: it unpickles inputs, weights and constants where a first,
safe attempt fails, evaluates symbolic sizes with sympy, executes the guards, resolves the operators
of the graph by name, and generates Python source from names. So every part is looked at before
torch sees it: only what ``QuantizedModel.save`` writes passes.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

_ENTRIES = re.compile(
    r"data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|data/(sample_inputs|weights|constants)/model\.pt|models/model\.json|extra/lightning_qat\.json"
    r"|byteorder|version|archive_version|archive_format|\.data/(version|serialization_id)"
    r"|\.format_version|\.storage_alignment"
)
"""What an archive may hold, below the folder that all of it is in."""

_PLAIN = re.compile(r"[^'\"\\\n\r{}]*")
_IDENTIFIER = re.compile(r"([A-Za-z_]\w*)?")
_SYMBOL = re.compile(r"[A-Za-z_]\w*")
_TEXT = (
    *("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "custom"),
    *("as_string", "as_strings"),
)
"""Fields that are carried as text, or written into source with ``repr``."""
_NAMES = ("name", "as_name", "forward_arg_names")
"""Fields that become names in generated source."""

_OPERATORS = re.compile(
    r"torch\.ops\.(aten|prims|lightning_qat|torchvision|quantized_decomposed)\.(?!from_file\b)"
    r"[a-z_0-9A-Z]+(\.\w+)?"
    r"|torch\.ops\.higher_order\.(cond|while_loop|scan|wrap_with_set_grad_enabled"
    r"|wrap_with_autocast)"
    r"|torch\.sym_(float|int|ite|max|min|not|sqrt|sum)|math\.(ceil|floor|trunc|sqrt)"
    r"|_operator\.(add|and_|eq|floordiv|ge|getitem|gt|le|lt|mod|mul|ne|neg|or_|pos|pow|sub|truediv)"
)
"""What a graph may call: operators that compute, not those that read files or call Python."""

_FUNCTIONS = frozenset(
    "Symbol Integer Float Rational Add Mul Pow Max Min Mod Abs floor ceiling Eq Ne Lt Le Gt Ge And "
    "Or Not Equality Unequality StrictLessThan LessThan StrictGreaterThan GreaterThan FloorDiv "
    "ModularIndexing Where PythonMod CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift "
    "PowByNatural FloatPow FloatTrueDiv IntTrueDiv IsNonOverlappingAndDenseIndicator TruncToFloat "
    "TruncToInt RoundToInt RoundDecimal ToFloat Identity".split()
)
_NODES = (
    *(ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.UnaryOp),
    *(ast.BinOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)
_GUARD_NODES = (*_NODES, ast.Subscript, ast.Attribute)
_LARGEST, _HIGHEST_POWER, _LONGEST = 2**63, 8, 10_000


def check_archive(path: Path) -> None:
    """Look at every part of an archive; nothing in it is executed.

    Args:
        path: The file.

    Raises:
        ValueError: A part is none that ``QuantizedModel.save`` writes; the first one is named.
        zipfile.BadZipFile: It is no archive.
    """
    with zipfile.ZipFile(path) as archive:
        contents = _contents(archive, path.stat().st_size)
        for name in ("weights", "constants"):
            _check_payload(contents, f"data/{name}/model_{name}_config.json", archive)
        for name in ("sample_inputs", "weights", "constants"):
            entry = contents.get(f"data/{name}/model.pt")
            if entry is not None:
                _check_pickle(archive.read(entry), entry.filename)
        model = contents.get("models/model.json")
        if model is None:
            raise ValueError("it holds no models/model.json")
        for problem in _problems(_json(archive.read(model), "models/model.json"), ""):
            raise ValueError(f"models/model.json: {problem}")


def _contents(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The entries by their names below the archive's folder."""
    found = {}
    for entry in archive.infolist():
        name = entry.filename.partition("/")[2]
        if not _ENTRIES.fullmatch(name):
            raise ValueError(f"it holds {entry.filename!r}, which no converted model has")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{entry.filename!r} must be stored as it is; it is compressed")
        found[name] = entry
    if sum(entry.file_size for entry in found.values()) > size:
        raise ValueError("its parts claim to be larger than the file")
    return found


def _check_payload(
    contents: Mapping[str, zipfile.ZipInfo], name: str, archive: zipfile.ZipFile
) -> None:
    """Refuse pickled weights and constants."""
    if name not in contents:
        return
    config = _json(archive.read(contents[name]), name)
    entries = config.get("config") if isinstance(config, dict) else None
    if not isinstance(entries, dict):
        raise ValueError(f"{name} must hold a table of tensors")
    for key, entry in entries.items():
        if not isinstance(entry, dict) or entry.get("use_pickle") is not False:
            raise ValueError(f"{name}: {key!r} must be plain numbers; it is a pickle")
        if not re.fullmatch(r"(weight|tensor)_\d+", str(entry.get("path_name"))):
            raise ValueError(f"{name}: {key!r} must be a tensor; it is {entry.get('path_name')!r}")


def _check_pickle(content: bytes, name: str) -> None:
    """Refuse a pickle that holds more than tensors and plain values."""
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception as error:  # unpicklers raise many kinds
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{name!r} must hold tensors and plain values alone: {reason}") from error


def _json(content: bytes, name: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON: {error}") from error


def _problems(value: Any, field: str) -> Iterator[str]:
    """What is wrong with the strings of a program, field by field."""
    waiting = [(value, field)]
    while waiting:
        value, field = waiting.pop()
        if isinstance(value, dict):
            for key, item in value.items():
                if not _PLAIN.fullmatch(key):
                    yield f"a name must hold no quotes, braces or line breaks; got {key!r}"
                waiting.append((item, key))
        elif isinstance(value, list):
            waiting += [(item, field) for item in value]
        elif isinstance(value, str):
            yield from _text_problems(value, field)


def _text_problems(text: str, field: str) -> Iterator[str]:
    if field == "expr_str":
        yield from _expression_problems(text, _NODES)
    elif field == "guards_code":
        yield from _expression_problems(text, _GUARD_NODES)
    elif field in ("in_spec", "out_spec"):
        yield from _problems(_json(text.encode(), field), field="")
    elif field == "context":
        # The keys of a dictionary, as JSON within JSON.
        try:
            yield from _problems(json.loads(text), field="")
        except (ValueError, RecursionError):
            if not _PLAIN.fullmatch(text):
                yield f"a tree's context must be plain; got {text!r}"
    elif field == "target":
        if not _OPERATORS.fullmatch(text):
            yield f"a graph must call operators of torch; got {text!r}"
    elif field in _NAMES:
        if not _IDENTIFIER.fullmatch(text):
            yield f"a name in the graph must be an identifier; got {text!r}"
    elif field not in _TEXT and not _PLAIN.fullmatch(text):
        yield f"{field!r} must hold no quotes, braces or line breaks; got {text!r}"


def _expression_problems(text: str, nodes: tuple[type[ast.AST], ...]) -> Iterator[str]:
    """What an expression of sizes may not hold: anything but arithmetic on symbols."""
    wrong = f"a size must be arithmetic on symbols; got {text[:80]!r}"
    if len(text) > _LONGEST:
        yield wrong
        return
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        yield wrong
        return
    if not all(isinstance(node, nodes) and _is_harmless(node) for node in ast.walk(tree)):
        yield wrong


def _is_harmless(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return bool(_SYMBOL.fullmatch(node.value))
        number = isinstance(node.value, bool | int | float)
        return number and abs(node.value) <= _LARGEST  # type: ignore[arg-type]
    if isinstance(node, ast.Name):
        return not node.id.startswith("_")
    if isinstance(node, ast.Attribute):
        return node.attr == "size"
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute):
            return not node.args and not node.keywords
        named = isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
        high = isinstance(node.func, ast.Name) and node.func.id in ("Pow", "PowByNatural")
        return named and (not high or _is_low_power(node))
    return not isinstance(node, ast.Pow | ast.LShift)


def _is_low_power(call: ast.Call) -> bool:
    """Whether an exponent is a small number: sympy would compute a tower of powers."""
    numbers = [n.value for n in ast.walk(call.args[-1]) if isinstance(n, ast.Constant)]
    return len(numbers) == 1 and isinstance(numbers[0], int) and abs(numbers[0]) <= _HIGHEST_POWER
