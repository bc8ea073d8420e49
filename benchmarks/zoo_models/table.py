"""The results of ``benchmarks.zoo`` as tables in Markdown, for docs/models.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Line = Mapping[str, Any]
Rows = Mapping[str, Sequence[Line]]
TARGETS = ("fake_quant_onnx", "cann", "tflite")
_STAGES = ("prepare", "train", "convert")
_FROM_FLOAT = "onnxruntime, no optimizations"


def table(rows: Rows) -> str:
    """Counts first, then one line per architecture, then what is float and what failed."""
    return "\n\n".join([_summary(rows), _architectures(rows), _details(rows)])


def _stage(lines: Sequence[Line], name: str) -> Line | None:
    """What a stage found; ``None`` where it was not reached or failed."""
    return next((one for one in lines if one["stage"] == name and "error" not in one), None)


def _summary(rows: Rows) -> str:
    """How many architectures come through each stage."""
    passed = [sum(_stage(r, name) is not None for r in rows.values()) for name in _STAGES]
    files = [[_stage(r, name) for r in rows.values()] for name in TARGETS]
    exact = [sum(f is not None and not f["differences"] for f in some) for some in files]
    whole = [sum(_is_whole(f) for f in some) for some in files]
    said = [sum(f is not None and not f["unsaid"] for f in some) for some in files]
    qdq = [(_stage(r, "convert"), _stage(r, "fake_quant_onnx")) for r in rows.values()]
    optimized = sum(f is not None and not f["optimized_float"] for _, f in qdq)
    near = sum(_is_near(convert, file) for convert, file in qdq)
    lines = [
        f"{len(rows)} architectures.",
        "",
        "| | " + " | ".join([*_STAGES, *TARGETS]) + " |",
        "|---|" + "---|" * (len(_STAGES) + len(TARGETS)),
        _row("come through", *passed, *(sum(f is not None for f in some) for some in files)),
        _row("numbers in the file equal to the bit", *("",) * len(_STAGES), *exact),
        _row("every product integer", *("",) * len(_STAGES), *whole),
        _row("every float product is named", *("",) * len(_STAGES), *said),
        "",
        f"No float Conv, Gemm or MatMul in ONNX Runtime's optimized session: {optimized}.",
        f"ONNX Runtime without optimizations is within max(1, 2c) steps of the model: {near}.",
    ]
    return "\n".join(lines)


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _is_whole(file: Line | None) -> bool:
    return file is not None and not file["float_products"]


def _is_near(convert: Line | None, file: Line | None) -> bool:
    """Within max(1, 2c) steps, c being how far the model itself moves."""
    if convert is None or file is None:
        return False
    return bool(file["steps"][_FROM_FLOAT] <= max(1.0, 2.0 * convert["moves"]))


def _architectures(rows: Rows) -> str:
    head = (
        *("architecture", "layers", "tensors", "float: layers, calls"),
        *("QDQ: integer/products", "steps", "c", "cann", "steps", "tflite", "steps"),
        *("step over float", "convert s", "QDQ s"),
    )
    lines = [_row(*head), "|---|" + "---|" * (len(head) - 1)]
    for name, row in rows.items():
        prepare, convert = _stage(row, "prepare") or {}, _stage(row, "convert") or {}
        cells: list[object] = [name, prepare.get("layers", ""), prepare.get("tensors", "")]
        cells.append(
            f"{len(prepare['skipped'])}, {len(prepare['left_float'])}" if prepare else "failed"
        )
        for target in TARGETS:
            file = _stage(row, target)
            if file is None:
                cells += ["no", ""]
            else:
                products = file.get("integer_products", 0) + len(file.get("float_products", ()))
                cells.append(f"{file.get('integer_products', 0)}/{products}")
                cells.append(f"{next(iter(file['steps'].values())):.3g}")
            if target == TARGETS[0]:
                cells.append(convert.get("moves", ""))
        plain, train = _stage(row, "float step"), _stage(row, "train")
        cells.append(f"{train['step'] / plain['step']:.1f}" if plain and train else "")
        cells.append(f"{convert['seconds']:.1f}" if convert else "")
        file = _stage(row, TARGETS[0])
        cells.append(f"{file['seconds']:.1f}" if file else "")
        lines.append(_row(*cells))
    return "\n".join(lines)


def _details(rows: Rows) -> str:
    """Reasons: what stays float by the report, what a file leaves float, what fails."""
    lines = []
    for name, row in rows.items():
        found = [f"{one['stage']} fails: {one['error']}" for one in row if "error" in one]
        prepare = _stage(row, "prepare")
        if prepare:
            found += prepare["skipped"] + prepare["left_float"]
        for target in TARGETS:
            file = _stage(row, target)
            found += [f"{target}: {text}" for text in (_float_of(file) if file else ())]
        if found:
            lines.append(f"- **{name}**: " + "; ".join(" ".join(f.split()) for f in found))
    return "\n".join(lines)


_NO_GRID = "because its output is not quantized"


def _float_of(file: Line) -> list[str]:
    """What one file leaves float, counted by reason, and where its numbers are not the model's."""
    without = sum(_NO_GRID in note for note in file["notes"])
    others = len(file["float_products"]) - without
    found = [f"{without} layers have no grid behind them"] if without else []
    if others > 0:
        found.append(f"{others} other products are float, as its notes say")
    found += [f"{product} is float and nothing says so" for product in file["unsaid"]]
    differences = file["differences"]
    if differences:
        found.append(f"{len(differences)} numbers differ: {differences[0]}")
    return found
