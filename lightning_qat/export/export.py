"""``export``: write a converted model with an exporter. Contains no file format."""

from __future__ import annotations

from pathlib import Path

from lightning_qat.export.delivery.artifact_check import checked_artifact
from lightning_qat.export.load import load_exporter
from lightning_qat.export.promises import with_broken_promises
from lightning_qat.export.protocol import Artifact, Exporter
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.out_of_memory import EXPORT_LATER, naming_memory_errors


def export(
    model: QuantizedModel,
    exporter: str | Exporter | type[Exporter],
    path_prefix: str | Path,
) -> Artifact:
    """Write a converted model for one target.

    Args:
        model: What ``convert`` returned.
        exporter: A name such as ``"fake_quant_onnx"`` or ``"cann"``, an exporter or its class.
        path_prefix: Folder and beginning of every file's name: ``out/net`` gives ``out/net_...``.

    Returns:
        The files, and in ``differences`` what is planned on integers and not in them.

    Raises:
        TypeError: ``model`` is not a converted model, or the exporter returned no ``Artifact``.
        ValueError: No such exporter, or it names files that it did not write.
        MissingDependency: The exporter needs a package that is not installed.
        OutOfMemory: Memory ran out; the message says how to go on.
        UnsupportedByTarget: With everything the target cannot express; nothing was written.
    """
    if not isinstance(model, QuantizedModel):
        raise TypeError(
            f"export takes a QuantizedModel; got {type(model).__name__}. Call "
            "convert(model, example_inputs) first."
        )
    loaded = load_exporter(exporter)
    loaded.check_available()
    prefix = Path(path_prefix)
    with naming_memory_errors(
        f"writing the files of target {loaded.name!r}",
        f"No half-written file is left. Free memory, or write this target alone. {EXPORT_LATER}",
    ):
        artifact = checked_artifact(loaded.export(model, prefix), loaded.name, prefix.parent)
        return with_broken_promises(model, artifact)
