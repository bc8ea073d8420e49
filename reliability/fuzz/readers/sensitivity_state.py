"""The measurements of layers that `sensitivity(resume=...)` goes on from."""

import math
from collections.abc import Sequence
from pathlib import Path

from lightning_qat.insight.sensitivity.result import LayerSize, Sensitivity, SensitivityRow
from lightning_qat.recipe.recipe import Recipe
from reliability.fuzz.mutate_text import mutate_json
from reliability.fuzz.reader import Reader


def _seeds(folder: Path) -> Sequence[Path]:
    result = Sensitivity(
        rows=(
            SensitivityRow("stem", "Conv2d", 8, 8, 41.2, 1e-4),
            SensitivityRow("head", "Linear", 4, 8, math.inf, 0.0),
        ),
        metric="SQNR (dB)",
        mode="only",
        recipe=Recipe.load("w4a4").to_dict(),
        float_value=math.inf,
        quantized_value=20.5,
        sizes=(LayerSize("stem", 8, 8, 432, 3_000), LayerSize("head", 4, 8, 80, 80)),
        never_run=("spare",),
        fingerprint="a1b2",
    )
    result.save(folder / "state.json")
    return [folder / "state.json"]


def _read(path: Path) -> None:
    result = Sensitivity.load(path)
    str(result)
    again = Sensitivity.from_dict(result.to_dict())
    assert again == result, f"written and read again it is another result: {again} {result}"


READER = Reader("sensitivity_state", _seeds, mutate_json, _read, (ValueError,))
