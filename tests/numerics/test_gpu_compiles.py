"""The kernels compile for the cards that people train on, with wide accesses and without spills.

Triton compiles without a GPU: its wheel brings NVIDIA's assembler. ``python -m
tests.numerics.test_gpu_compiles`` prints registers and spills of all.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lightning_qat.numerics.gpu.activations import RUNS
from lightning_qat.numerics.gpu.device_grid import GridRule
from lightning_qat.numerics.gpu.weights import BLOCK

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[2]
CARDS = {"A100": 80, "H100": 90, "B200": 100}
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
INT8 = {"QMIN": -128, "QMAX": 127}


class Case(NamedTuple):
    """A kernel with the types of its arguments.

    ``T`` is the dtype of what is quantized, ``1`` a size of 1.
    """

    kernel: str
    tensors: str
    numbers: str
    constants: Mapping[str, int]


ACTIVATION = "T f32 f32 T u8 i8 f32 f32"
OBSERVING = Case(
    "fake_quantize",
    ACTIVATION,
    "i32 i32 i32 f32 f32",
    {**INT8, "RULE": GridRule.RANGE, "BITS": 1, "CODES": 0, "OBSERVE": 1, "RUNS": RUNS},
)
CASES = {
    "observing": OBSERVING,
    "compact": OBSERVING._replace(constants={**OBSERVING.constants, "CODES": 1}),
    "learned": Case(
        "fake_quantize",
        ACTIVATION,
        "i32 i32 i32 f32 f32",
        {
            **INT8,
            "RULE": GridRule.HALF_WIDTH_AND_LOW,
            "BITS": 0,
            "CODES": 0,
            "OBSERVE": 0,
            "RUNS": RUNS,
        },
    ),
    "more than 2**31 values": OBSERVING._replace(numbers="i64 i32 i32 f32 f32"),
    "one program, a size of one": Case(
        "fake_quantize",
        ACTIVATION,
        "1 1 i32 f32 f32",
        {
            **INT8,
            "RULE": GridRule.SYMMETRIC_RANGE,
            "BITS": 1,
            "CODES": 1,
            "OBSERVE": 1,
            "RUNS": RUNS,
        },
    ),
    "range": Case("value_range", "T f32", "i32 f32 f32", {"RUNS": RUNS}),
    "masked": Case("masked", "T u8 T", "i32", {"RUNS": RUNS}),
    "restore": Case("restore", "i8 f32 f32 T", "i32 i32", {"FROM_ZERO": 0, "RUNS": RUNS}),
    "learned backward": Case(
        "learned_backward",
        "T T f32 f32 T f32",
        "i32 i32 f32",
        {**INT8, "RULE": GridRule.HALF_WIDTH_AND_LOW, "CLAMPED": 1, "RUNS": RUNS},
    ),
    "learned finish": Case(
        "learned_finish",
        "f32 f32 f32 f32 f32",
        "i32 f32",
        {**INT8, "RULE": GridRule.HALF_WIDTH_AND_LOW, "BLOCK": 1024},
    ),
    "learned finish of one program": Case(
        "learned_finish",
        "f32 f32 f32 f32 f32",
        "1 f32",
        {**INT8, "RULE": GridRule.RANGE, "BLOCK": 1},
    ),
    "weight ranges": Case("weight_ranges", "i64 T f32", "", {"BLOCK": BLOCK}),
    "weights": Case(
        "quantize_weights",
        "i64 T f32 T i8 f32",
        "",
        {"QMIN": -127, "QMAX": 127, "ARQ": 0, "CODES": 0, "BLOCK": BLOCK},
    ),
}

WIDE = {"observing", "learned", "more than 2**31 values", "masked", "learned backward"}
"""Those that read and write whole tensors of the dtype."""


def compiled(case: Case, dtype: str, card: int) -> Any:
    """A kernel for arguments at addresses and of sizes that are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    modules = ("kernels", "weight_kernels")
    found = [importlib.import_module(f"lightning_qat.numerics.gpu.{name}") for name in modules]
    kernel = next(getattr(m, case.kernel) for m in found if hasattr(m, case.kernel))
    tensors = [f"*{name.replace('T', dtype)}" for name in case.tensors.split()]
    types = [*tensors, *case.numbers.split()]
    types = [re.sub(r"\bf32\b", "fp32", name) for name in types]
    signature = dict(zip(kernel.arg_names, types, strict=False))
    # A size of 1 is a constant to Triton.
    ones = {name: 1 for name, kind in signature.items() if kind == "1"}
    constants = {name: int(value) for name, value in {**case.constants, **ones}.items()}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(types)
        if name.startswith("*") or name in ("i32", "i64")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", card, 32), options={"enable_fp_fusion": False}
    )


def resources(kernel: Any) -> dict[str, int]:
    """Registers per thread, and bytes of spills, as NVIDIA's ``cuobjdump`` reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        said = subprocess.run(
            [tool, "-res-usage", path], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+).*?LOCAL:(\d+)", said.stdout + said.stderr)
    assert found is not None, said
    return {"registers": int(found[1]), "spills": int(found[2])}


def looked_at(case: Case, dtype: str, card: int) -> dict[str, Any]:
    """Resources of a compiled kernel, and what its assembly shows."""
    kernel = compiled(case, DTYPES[dtype], card)
    ptx = kernel.asm["ptx"]
    # 16 bytes at a time, and on the newest card 32.
    vector = r"\.v[48]\.b32"
    return {
        **resources(kernel),
        "divides": "div.rn.f32" in ptx,
        # Division that is not exact, what rounds once for two operations, or loses what is small.
        "inexact": bool(re.search(r"\b(fma\.rn|div\.full|div\.approx|\w+\.ftz)\.f32", ptx)),
        "wide": all(re.search(rf"{way}\.global{vector}", ptx) for way in ("ld", "st")),
    }


def cards_of(dtype: str) -> list[int]:
    """All cards for one dtype: what differs between dtypes is the same on all of them."""
    return list(CARDS.values()) if dtype == "bfloat16" else [CARDS["H100"]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All of it, from a process of its own: the interpreter leaves its traces in Triton."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "tests.numerics.test_gpu_compiles", "--json"]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return result


@pytest.mark.xdist_group("kernels compiled ahead of time")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_compiles(name: str, dtype: str, found: dict[str, dict[str, Any]]) -> None:
    for card in cards_of(dtype):
        kernel = found[f"{name}/{dtype}/{card}"]
        assert kernel["spills"] == 0
        assert not kernel["inexact"]
        assert kernel["wide"] or name not in WIDE


@pytest.mark.xdist_group("kernels compiled ahead of time")
def test_what_divides_does_so_exactly(found: dict[str, dict[str, Any]]) -> None:
    assert found["observing/float32/90"]["divides"]
    assert not found["masked/float32/90"]["divides"]


def _print_all(*, as_json: bool) -> None:
    found = {}
    for name, case in CASES.items():
        for dtype in DTYPES:
            for card in cards_of(dtype) if as_json else CARDS.values():
                found[f"{name}/{dtype}/{card}"] = looked_at(case, dtype, card)
                if not as_json:
                    print(f"{name:32} {dtype:9} sm_{card:<4} {found[f'{name}/{dtype}/{card}']}")
    if as_json:
        print(json.dumps(found))


if __name__ == "__main__":
    _print_all(as_json="--json" in sys.argv)
