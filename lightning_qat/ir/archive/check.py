"""Every part of a ``.pt2`` file, looked at before torch sees it.

``torch.export.load`` trusts its file: it unpickles inputs, weights and constants where a first,
safe attempt fails, evaluates symbolic sizes with sympy, executes the guards, calls whatever the
graph names, and generates Python source from names. Only what ``QuantizedModel.save`` writes
passes.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from lightning_qat.ir.archive.expressions import guard_problems, size_problems
from lightning_qat.ir.archive.operators import is_operator
from lightning_qat.ir.archive.payload import check_payload
from lightning_qat.torch_files.parts import Part, parts
from lightning_qat.torch_files.pickles import UnknownClass
from lightning_qat.torch_files.saved import check_saved

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
_TEXT = (
    *("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "custom"),
    *("as_string", "as_strings"),
)
"""Fields that are carried as text, or written into source with ``repr``."""
_NAMES = ("name", "as_name", "forward_arg_names")
"""Fields that become names in generated source."""
_MOST_LEVELS = 100


class Untrusted(ValueError):
    """A part that a file of one's own may have, and that may run code."""


def check_archive(file: BinaryIO) -> None:
    """Look at every part of an archive; nothing in it is executed.

    Args:
        file: The open archive; it is read from its beginning again afterwards.

    Raises:
        Untrusted: It calls operators, or holds objects, that may run code.
        ValueError: A part is none that ``QuantizedModel.save`` writes, or claims to be larger than
            it is; the first one is named.
    """
    found = parts(file)
    for name in found:
        if not _ENTRIES.fullmatch(name):
            raise Untrusted(f"it holds {name!r}, which no converted model has")
    for name in ("weights", "constants"):
        config = found.get(f"data/{name}/model_{name}_config.json")
        if config is not None:
            check_payload(_json(config.read(file), config.name), config.name, found)
    for name in ("sample_inputs", "weights", "constants"):
        part = found.get(f"data/{name}/model.pt")
        if part is not None:
            _check_saved(part, file)
    model = found.get("models/model.json")
    if model is None:
        raise ValueError("it holds no models/model.json")
    for problem in _problems(_json(model.read(file), model.name), ""):
        raise ValueError(f"models/model.json: {problem}")
    file.seek(0)


def _check_saved(part: Part, file: BinaryIO) -> None:
    content = part.read(file)
    if not content:
        return
    try:
        check_saved(io.BytesIO(content))
    except ValueError as error:
        kind = Untrusted if isinstance(error, UnknownClass) else ValueError
        raise kind(f"{part.name!r} must hold tensors and plain values alone: {error}") from error


def _json(content: bytes, name: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON: {error}") from error


def _problems(value: Any, field: str) -> Iterator[str]:
    """What is wrong with the strings of a program, field by field."""
    waiting = [(value, field, 0)]
    while waiting:
        value, field, level = waiting.pop()
        if level > _MOST_LEVELS:
            yield f"it is nested more than {_MOST_LEVELS} levels deep"
        elif isinstance(value, dict):
            for key, item in value.items():
                if not _PLAIN.fullmatch(key):
                    yield f"a name must hold no quotes, braces or line breaks; got {key!r}"
                waiting.append((item, key, level + 1))
        elif isinstance(value, list):
            waiting += [(item, field, level + 1) for item in value]
        elif isinstance(value, str):
            yield from _text_problems(value, field)


def _text_problems(text: str, field: str) -> Iterator[str]:
    if field == "expr_str":
        yield from size_problems(text)
    elif field == "guards_code":
        yield from guard_problems(text)
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
        if not is_operator(text):
            raise Untrusted(
                "models/model.json: a graph must call operators of torch that compute numbers; "
                f"got {text[:80]!r}"
            )
    elif field in _NAMES:
        if not _IDENTIFIER.fullmatch(text):
            yield f"a name in the graph must be an identifier; got {text!r}"
    elif field not in _TEXT and not _PLAIN.fullmatch(text):
        yield f"{field!r} must hold no quotes, braces or line breaks; got {text!r}"
