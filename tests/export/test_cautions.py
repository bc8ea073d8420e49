"""When an agreement says less than it seems to."""

import numpy as np
import pytest

from lightning_qat.export.cautions import cautions
from lightning_qat.export.verify import compare_output

RANDOM = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)


def test_different_samples_and_outputs_need_no_caution() -> None:
    assert cautions({"x": RANDOM}, {"y": RANDOM}, 8) == ()


def test_equal_samples_count_as_one() -> None:
    (text,) = cautions({"x": np.zeros((8, 3))}, {"y": np.zeros((8, 2))}, 8)
    assert text.startswith("All 8 samples are equal, so they count as one. Verify with real data")


def test_few_samples_say_little() -> None:
    (text,) = cautions({"x": RANDOM[:2]}, {"y": RANDOM[:2]}, 2)
    assert text.startswith("Samples compared: 2, too few to say much.")


def test_an_output_that_never_changes_is_named() -> None:
    outputs = {"logits": np.tile(RANDOM[:1], (8, 1)), "other": RANDOM}
    (text,) = cautions({"x": RANDOM}, outputs, 8)
    assert text.startswith("Output 'logits' is the same for all 8 samples")


@pytest.mark.parametrize(("constant", "one"), [(True, True), (False, False)])
def test_one_class_for_all_rows_is_marked(constant: bool, one: bool) -> None:
    rows = np.eye(3)[[1, 1, 1] if constant else [0, 1, 2]]
    result = compare_output("y", rows, rows)
    assert (result.same_argmax, result.one_argmax) == (1.0, one)
