"""Where two models differ: the one function for all pairs."""

from __future__ import annotations

from torch import nn

from lightning_qat.export.compare.comparison import Comparison
from lightning_qat.export.compare.file import compare_file
from lightning_qat.export.load import load_exporter
from lightning_qat.export.protocol import Artifact, Exporter
from lightning_qat.insight.compare_float import compare_converted, compare_trained
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.model.inputs import Inputs, as_call
from lightning_qat.out_of_memory import naming_memory_errors


@naming_memory_errors(
    "comparing two models",
    "Give it a smaller batch: compare keeps every tensor of both models",
)
def compare(
    model: nn.Module | QuantizedModel,
    other: Artifact | nn.Module | None = None,
    inputs: Inputs | None = None,
    *,
    exporter: Exporter | None = None,
) -> Comparison:
    """Compare two models tensor by tensor, in the order of calls.

    ===================  ========================  =================================================
    model                other                     what the rows say
    ===================  ========================  =================================================
    converted model      file (``Artifact``)       what the file computes in every quantized tensor:
                                                   accumulated, and by its layer alone
    prepared model       nothing, or a float one   what quantization changes, accumulated and by
                                                   each layer alone; every weight
    converted model      a float one               what quantization has changed in the inputs of
                                                   layers and in the outputs
    ===================  ========================  =================================================

    An error grows through a deep network although no layer is wrong. So a tensor's *own* error is
    measured as well: its layers read what the reference has computed, and nothing else has gone
    wrong before them. ``Comparison.departure`` is the first tensor whose own error is more than
    rounding explains.

    Everything is computed in eval mode on the CPU, and the values of every tensor are held at once:
    a few dozen samples are enough.

    Args:
        model: A converted model, or a prepared one that has ranges; neither is changed.
        other: The artifact that ``export`` returned, or a float module of the same parameters.
            ``None``: the prepared model's own float weights.
        inputs: What ``forward`` takes; by default the converted model's example inputs.
        exporter: The exporter that wrote the artifact, when it has options.

    Raises:
        TypeError: The two cannot be compared.
        ValueError: Inputs or parameters do not fit; the exporter does not show its tensors.
        CannotRun: The file cannot be run so.

    Example:
        >>> from lightning_qat import export, prepare, convert
        >>> comparison = compare(quantized, export(quantized, "cann", "net"), images)
        ... # doctest: +SKIP
        >>> comparison.departure is None  # doctest: +SKIP
        True
    """
    if isinstance(model, QuantizedModel):
        args, kwargs = model.example_inputs if inputs is None else as_call(inputs)
        if isinstance(other, Artifact):
            target = exporter or load_exporter(other.target)
            return compare_file(model, other, target, args, kwargs)
        if isinstance(other, nn.Module):
            return compare_converted(model, other, args, kwargs)
        raise TypeError(
            "A converted model is compared with the Artifact that export returned or with a float "
            f"module; got {type(other).__name__}."
        )
    if not isinstance(model, nn.Module) or isinstance(other, Artifact):
        raise TypeError(
            "compare takes a converted model (convert(model, inputs)) and an artifact, or a "
            f"prepared module; got {type(model).__name__} and {type(other).__name__}."
        )
    if inputs is None:
        raise ValueError(
            "inputs must be what forward takes: a prepared model has no example inputs of its own."
        )
    return compare_trained(model, other, *as_call(inputs))
