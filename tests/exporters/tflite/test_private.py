"""Private parts of the TFLite converters: used while a model is converted, restored afterwards."""

import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from lightning_qat.export.protocol import MissingDependency
from lightning_qat_exporters.tflite.litert import private as litert
from lightning_qat_exporters.tflite.litert.conv_transpose_op import lower
from lightning_qat_exporters.tflite.tinynn import backend as tinynn_backend
from lightning_qat_exporters.tflite.tinynn import private as tinynn

pytestmark = pytest.mark.xdist_group("tflite")


@pytest.fixture
def needs_litert() -> None:
    pytest.importorskip("litert_torch")


@pytest.fixture
def needs_tinynn() -> None:
    try:
        tinynn_backend.check_available()
    except MissingDependency as error:
        pytest.skip(str(error))


def changed_and_restored(
    change: Callable[[], AbstractContextManager[None]], state: Callable[[], Any]
) -> bool:
    """A block changes the state; it is as before after the block, and after one that raises."""
    before = state()
    with change():
        inside = state()
    assert state() == before
    with pytest.raises(ZeroDivisionError), change():
        raise ZeroDivisionError
    assert state() == before
    return bool(inside != before)


# litert-torch


def test_the_import_registers_the_operators_of_pairs() -> None:
    operators = litert.quantized_decomposed()
    for kind in ("per_tensor", "per_channel"):
        assert hasattr(operators, f"quantize_{kind}")
        assert hasattr(operators, f"dequantize_{kind}")


@pytest.mark.parametrize("set_before", [True, False])
def test_the_environment_is_restored(set_before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "LITERT_TORCH_SHOW_PROGRESS"
    if set_before:
        monkeypatch.setenv(name, "y")
    else:
        monkeypatch.delenv(name, raising=False)
    assert changed_and_restored(litert.without_progress, lambda: dict(os.environ))


@pytest.mark.usefixtures("needs_litert")
def test_litert_torch_reads_the_variables_that_are_set() -> None:
    from litert_torch import _config

    with litert.without_progress():
        assert not _config.config.show_progress
        assert not _config.config.silence_torch_logs


@pytest.mark.usefixtures("needs_litert")
def test_a_lowering_is_in_litert_torch_s_registry_for_the_time_of_a_block() -> None:
    from litert_torch.backend.lowerings import registry

    operator = torch.ops.lightning_qat_litert.transpose_conv.default
    assert changed_and_restored(
        lambda: litert.registered(operator, lower),
        lambda: dict(registry.global_registry.registered_ops),
    )
    with litert.registered(operator, lower):
        assert registry.lookup(operator) is lower


@pytest.mark.usefixtures("needs_litert")
def test_the_bindings_that_a_custom_call_needs_are_there() -> None:
    for name in ("litert_converter.mlir.ir", "litert_converter.mlir.dialects.stablehlo"):
        assert importlib.util.find_spec(name) is not None


# TinyNeuralNetwork


@pytest.mark.usefixtures("needs_tinynn")
def test_operators_are_in_the_table_for_the_time_of_a_block() -> None:
    with tinynn.contained():
        from tinynn.converter.operators.torch import OPERATOR_CONVERTER_DICT as TABLE

    known = next(iter(TABLE))
    converters = {known: object, "lightning_qat_test::new": object}
    assert changed_and_restored(lambda: tinynn.registered(converters), lambda: dict(TABLE))


@pytest.mark.usefixtures("needs_tinynn")
def test_passes_are_left_out_for_the_time_of_a_block() -> None:
    with tinynn.contained():
        from tinynn.converter.operators.optimize import GraphOptimizer
    assert changed_and_restored(
        lambda: tinynn.without_passes("fuse_activation", "fuse_requantize"),
        lambda: dict(vars(GraphOptimizer)),
    )


@pytest.mark.usefixtures("needs_tinynn")
def test_a_pass_that_is_gone_is_an_error() -> None:
    with pytest.raises(KeyError, match="no_such_pass"), tinynn.without_passes("no_such_pass"):
        pass


@pytest.mark.usefixtures("needs_tinynn")
def test_sets_are_ordered_for_the_time_of_a_block() -> None:
    with tinynn.contained():
        from tinynn.converter.operators import graph, optimize
    assert changed_and_restored(
        lambda: tinynn.ordered_sets(dict),
        lambda: [vars(module).get("set") for module in (graph, optimize)],
    )
