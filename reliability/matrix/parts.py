"""The tests that a row runs: the smallest that touch what other packages may change."""

from __future__ import annotations

PARTS: dict[str, tuple[str, ...]] = {
    "core": (
        "tests/test_public_api.py",
        "tests/numerics/test_arithmetic.py",
        "tests/numerics/test_kernels.py",
        "tests/quantizers/test_quantizers.py",
        "tests/function_hooks/test_contexts.py",
        "tests/layers/test_layers.py",
    ),
    "training": (
        "tests/callback/test_private_hooks.py",
        "tests/callback/test_hook_order.py",
        "tests/callback/test_phases.py",
        "tests/callback/test_resume.py",
        "tests/callback/test_loops.py",
        "tests/callback/test_precision.py",
        "tests/callback/test_export.py",
        "tests/callback/test_step_log.py",
        "tests/callback/test_cli.py",
    ),
    "compile": (
        "tests/model/test_torch_private.py",
        "tests/model/test_torch_compile.py",
        "tests/callback/test_compiled_and_checkpointed.py",
    ),
    "checkpoint": ("tests/checkpoint/test_load.py", "tests/callback/test_checkpoints.py"),
    "convert": (
        "tests/convert/test_convert.py",
        "tests/convert/test_capture.py",
        "tests/convert/test_fold_batchnorm.py",
        "tests/ir/test_exported_program.py",
        "tests/ir/archive",
        "tests/ir/test_operators.py",
    ),
    "onnx": (
        "tests/exporters/fake_quant_onnx/test_exporter.py",
        "tests/exporters/fake_quant_onnx/test_int4.py",
        "tests/exporters/onnx_files",
        "tests/exporters/qdq",
        "tests/exporters/test_equal_numbers.py",
    ),
    "cann": (
        "tests/exporters/cann/test_convert_qat_model.py",
        "tests/exporters/cann/test_executor.py",
        "tests/exporters/cann/test_standard_operators.py",
        "tests/exporters/cann/test_lint_exports.py",
        "tests/exporters/cann/test_amct_goldens.py",
    ),
    "cli": (
        "tests/cli/test_program.py",
        "tests/cli/test_export.py",
        "tests/cli/test_verify.py",
        "tests/cli/test_inspect.py",
    ),
    "tflite": (
        "tests/exporters/tflite/test_exporter.py",
        "tests/exporters/tflite/test_private.py",
        "tests/exporters/tflite/test_convolutions.py",
    ),
}

EVERYTHING = tuple(name for name in PARTS if name != "tflite")
"""The parts that need no extra."""


def paths(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Files and folders of tests."""
    return tuple(path for part in parts for path in PARTS[part])
