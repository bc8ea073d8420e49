"""Write a converted model for every target, check each file, and list it all in a manifest."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from lightning_qat.export.delivery.guard import Interrupts, watched_interrupts
from lightning_qat.export.delivery.manifest import MANIFEST, withdraw, write_manifest
from lightning_qat.export.delivery.one_target import Order, export_one
from lightning_qat.export.delivery.own_process import export_apart
from lightning_qat.export.delivery.result import Delivery, ExportResult, NotTried
from lightning_qat.export.protocol import Exporter, as_arrays
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.work_folder import work_folder


def export_all(
    model: QuantizedModel,
    exporters: Sequence[Exporter],
    folder: Path,
    name: str,
    *,
    saved: Path | None = None,
    check: bool = True,
    inputs: Any = None,
    source: str | None = None,
    training: Mapping[str, Any] | None = None,
    timeout: float | None = None,
) -> Delivery:
    """Save the model, export to every target and write ``manifest.json`` beside the files.

    Nothing that fails keeps the rest from being written: not a target, not the model's own file,
    not the manifest. Errors of targets are in the results and in the manifest. Targets that a
    manifest in the folder has of the same model, by its ``fingerprint``, stay in it; those of
    another model do not.

    Args:
        model: The converted model.
        exporters: One per target.
        folder: Where the files go; made when it is missing.
        name: Beginning of every file's name.
        saved: A file that holds the model already; ``None``: it is saved as ``<name>.pt2``.
        check: Verify every artifact.
        inputs: What to verify with; the model's example inputs by default.
        source: Where these inputs are from, in words.
        training: What the report shall say of the run, as primitives; ``None``: nothing is known.
        timeout: Seconds that each target may take, in a process of its own, which may also crash;
            ``None``: as long as it takes, in this process.

    Returns:
        What was written and what was not. Its ``interrupt`` is Ctrl-C, and the like: the caller
        raises it again.

    Raises:
        ValueError: Two exporters have the same name, so they would write the same files.
    """
    refuse_repeated(exporters)
    folder = folder.absolute()
    names = [exporter.name for exporter in exporters]
    earlier = withdraw(folder, names)
    unwritten: dict[str, BaseException] = {}
    if saved is None:
        saved = folder / f"{name}.pt2"
        try:
            model.save(saved)
        except Exception as error:
            unwritten[saved.name], saved = error, None
    order = Order(folder / name, check, inputs, source)
    with ExitStack() as stack:
        interrupts = stack.enter_context(watched_interrupts())
        if timeout is None:
            export = _here(model, saved, order, interrupts)
        else:
            export = _apart(model, saved, order, timeout, stack)
        results, interrupt = _one_by_one(exporters, export, interrupts)
    try:
        write_manifest(folder, model, results, earlier=earlier, training=training)
    except Exception as error:
        unwritten[MANIFEST] = error
    return Delivery(folder, results, saved, unwritten, interrupt)


def refuse_repeated(exporters: Sequence[Exporter]) -> None:
    """Raise ``ValueError`` when two exporters have one name: they would write the same files."""
    names = [exporter.name for exporter in exporters]
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise ValueError(
            f"Each target may be asked for once, else its files overwrite each other; got "
            f"{repeated} more than once. Keep one, and write the other after training to another "
            "path: export(QuantizedModel.load('...pt2'), exporter, path_prefix)."
        )


_Export = Callable[[Exporter], ExportResult]


def _one_by_one(
    exporters: Sequence[Exporter], export: _Export, interrupts: Interrupts
) -> tuple[tuple[ExportResult, ...], BaseException | None]:
    """One result each, and what ended the exports early."""
    results: list[ExportResult] = []
    interrupt: BaseException | None = None
    for exporter in exporters:
        if interrupt is not None:
            why = NotTried("it was not tried, because the run was interrupted")
            results.append(ExportResult(exporter.name, error=why))
            continue
        try:
            results.append(export(exporter))
        except BaseException as error:
            if isinstance(error, Exception) or not interrupts.arrived:
                raise
            interrupt = error
            results.append(ExportResult(exporter.name, error=error))
    return tuple(results), interrupt


def _here(
    model: QuantizedModel, saved: Path | None, order: Order, interrupts: Interrupts
) -> _Export:
    """Exports in this process, with the model anew for the others when one has changed it."""
    current, before = model, _state(model)
    spare = copy.deepcopy(model) if saved is None else None

    def export(exporter: Exporter) -> ExportResult:
        nonlocal current, before
        result = export_one(current, exporter, order, interrupts)
        if _state(current) == before:
            return result
        current = _anew(saved, spare)
        before = _state(current)
        changed = RuntimeError(
            f"the exporter changed the converted model, which it may only read, so its files are "
            f"not to be trusted; the other targets get the model as it was. That is for the author "
            f"of {exporter.name!r} to mend."
        )
        changed.__cause__ = result.error
        return replace(result, error=changed)

    return export


def _anew(saved: Path | None, spare: QuantizedModel | None) -> QuantizedModel:
    if saved is not None:
        # What this process has written, or what it has read the model from.
        return QuantizedModel.load(saved, trust=True)
    return copy.deepcopy(spare) if spare is not None else spare  # type: ignore[return-value]


def _apart(
    model: QuantizedModel, saved: Path | None, order: Order, timeout: float, stack: ExitStack
) -> _Export:
    """Exports in processes of their own, which read the model from its file."""
    file = saved
    if file is None:
        with suppress(OSError):
            file = stack.enter_context(work_folder(Path(gettempdir()))) / "model.pt2"
            model.save(file)

    def export(exporter: Exporter) -> ExportResult:
        if file is None or not file.is_file():
            why = OSError("a timeout needs a file of the model, and none could be written")
            return ExportResult(exporter.name, error=why)
        return export_apart(file, exporter, order, timeout)

    return export


def _state(model: QuantizedModel) -> Any:
    """What an exporter must not change: every number, every call of the graph, the example."""
    try:
        nodes = [
            (n.name, n.op, str(n.target), *map(str, n.args)) for n in model.program.graph.nodes
        ]
        example = as_arrays(model.flat_inputs(*model.example_inputs))
        inputs = [(name, array.shape, hash(array.tobytes())) for name, array in example.items()]
        return replace(model).fingerprint, nodes, inputs
    except Exception as error:  # an error equals no other: it is changed
        return error
