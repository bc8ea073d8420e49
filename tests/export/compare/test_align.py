"""Which tensor of a file is which of the model."""

from collections.abc import Mapping

import numpy as np

from lightning_qat.export.compare.align import Match, Wanted, align
from lightning_qat.export.protocol import Array
from lightning_qat.export.trace import TracedTensor

RANDOM = np.random.default_rng(0)


def values(*shape: int) -> Array:
    return RANDOM.normal(size=shape).astype(np.float32)


def wanted(name: str, scale: float, array: Array) -> Wanted:
    return Wanted(name, name.split("@")[0], scale, 0, array)


def names(matches: Mapping[str, Match]) -> dict[str, str]:
    return {name: match.found.name for name, match in matches.items()}


def test_keys_decide_where_a_file_has_them() -> None:
    a, b = values(2, 3), values(2, 3)
    file = [TracedTensor("q", 9.0, 0, b, ("y",)), TracedTensor("p", 9.0, 0, a, ("x",))]
    found = align([wanted("x", 0.1, a), wanted("y", 0.2, b)], file)
    assert names(found) == {"x": "p", "y": "q"}


def test_a_quantizer_that_runs_twice_has_two_tensors() -> None:
    a, b = values(2, 3), values(2, 3)
    file = [TracedTensor("first", 1.0, 0, a, ("x",)), TracedTensor("second", 1.0, 0, b, ("x",))]
    found = align([wanted("x", 1.0, a), wanted("x@1", 1.0, b)], file)
    assert names(found) == {"x": "first", "x@1": "second"}


def test_channels_last_and_axes_of_one_are_another_layout() -> None:
    a = values(2, 3, 4, 5)
    stored = a.transpose(0, 2, 3, 1)[:, None]
    (match,) = align([wanted("x", 0.1, a)], [TracedTensor("t", 0.1, 0, stored)]).values()
    assert np.array_equal(match.layout.to_model(stored), a)
    assert np.array_equal(match.layout.to_file(a), stored)


def test_of_equal_scales_the_closest_values_are_taken() -> None:
    a = values(2, 4, 4)
    file = [
        TracedTensor("before relu", 0.1, 0, a),
        TracedTensor("transposed", 0.1, 0, np.maximum(a, 0).transpose(0, 2, 1).copy()[::-1]),
        TracedTensor("relu", 0.1, 0, np.maximum(a, 0)),
    ]
    found = align([wanted("x", 0.1, np.maximum(a, 0))], file)
    assert names(found) == {"x": "relu"}


def test_a_tensor_of_a_wrong_scale_is_found_by_its_values() -> None:
    a, b, c = values(2, 6), values(2, 6), values(2, 6)
    file = [
        TracedTensor("a", 0.1, 0, a),
        TracedTensor("b", 0.33, 0, b * np.float32(1.1)),
        TracedTensor("c", 0.5, 0, c),
    ]
    found = align([wanted("x", 0.1, a), wanted("y", 0.3, b), wanted("z", 0.5, c)], file)
    assert names(found) == {"x": "a", "y": "b", "z": "c"}


def test_what_a_file_does_not_have_is_left_out() -> None:
    a, b = values(2, 6), values(2, 6)
    found = align([wanted("x", 0.1, a), wanted("y", 0.3, b)], [TracedTensor("a", 0.1, 0, a)])
    assert names(found) == {"x": "a"}
