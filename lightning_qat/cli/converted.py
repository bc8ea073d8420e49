"""A converted model, from its own file or from the checkpoint of a QAT run."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_qat.cli.arrays import example_inputs
from lightning_qat.cli.console import say
from lightning_qat.cli.module_class import LightningConfig
from lightning_qat.cli.trained_module import (
    module_class,
    recipe_of,
    require_checkpoint,
    trained_module,
)

if TYPE_CHECKING:
    from lightning_qat.ir.quantized_model import QuantizedModel


@dataclass(frozen=True)
class CheckpointOptions:
    """How to read a checkpoint; see the options of ``lightning-qat export``.

    Args:
        module: Dotted path of the module's class.
        init_args: Arguments of its constructor.
        config: LightningCLI's configuration.
        example_inputs: What its ``forward`` takes.
        trust: Load objects other than tensors and plain values, and a ``.pt2`` without a look at
            it.
    """

    module: str | None = None
    init_args: str | None = None
    config: Path | None = None
    example_inputs: str | None = None
    trust: bool = False


def is_converted(path: Path) -> bool:
    """Whether a file is one that ``QuantizedModel.save`` wrote, or is called so."""
    if path.is_file() and zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                return any(name.endswith("lightning_qat.json") for name in archive.namelist())
        except (zipfile.BadZipFile, NotImplementedError, ValueError):
            pass  # its reader says what is wrong
    return path.suffix == ".pt2"


def converted_model(path: Path, *, trust: bool) -> QuantizedModel:
    """A converted model from its file.

    Args:
        path: A ``.pt2``.
        trust: Load it without a look at it, which may run code.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no converted model, or must be trusted.
    """
    from lightning_qat.ir.quantized_model import QuantizedModel

    try:
        return QuantizedModel.load(path, trust=trust)
    except ValueError as error:
        raise ValueError(str(error).replace("pass trust=True", "add --trust")) from error


def load_converted(path: Path, options: CheckpointOptions) -> tuple[QuantizedModel, str]:
    """A converted model, and the beginning of its files' names.

    Args:
        path: A ``.pt2`` of a converted model, or the checkpoint of a QAT run.
        options: For a checkpoint.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is neither, or an option is missing or wrong; the message says which.
    """
    if not is_converted(path):
        return _from_checkpoint(path, options)
    if replace(options, trust=False) != CheckpointOptions():
        raise ValueError(
            f"{str(path)!r} is a converted model, which needs no module, arguments or inputs. "
            "Leave out --module, --init-args, --config and --example-inputs."
        )
    return converted_model(path, trust=options.trust), path.stem


def _from_checkpoint(path: Path, options: CheckpointOptions) -> tuple[QuantizedModel, str]:
    require_checkpoint(path, " or a converted model (.pt2)")
    config = None if options.config is None else LightningConfig(options.config)
    cls = module_class(path, options.module, config)

    from lightning_qat.checkpoint.load import load_qat_checkpoint

    module = trained_module(
        cls,
        path,
        load_qat_checkpoint,
        init_args=options.init_args,
        config=config,
        trust=options.trust,
    )
    recipe = recipe_of(path, trust=options.trust)

    from lightning_qat.convert.capture import CaptureError
    from lightning_qat.convert.convert import convert

    said = config.quantization if config else {}
    inputs = _inputs(module, options.example_inputs, said)
    say("converting")
    try:
        model = convert(
            module.float(),
            inputs,
            recipe=recipe,
            dynamic_shapes=said.get("dynamic_shapes"),
            export_outputs=said.get("export_outputs"),
        )
    except CaptureError as error:
        raise ValueError(str(error)) from error
    return model, cls.__name__.lower()


def _inputs(module: Any, given: str | None, said: Any) -> Any:
    """Example inputs: the option's, the callback's in the configuration, or the module's."""
    import torch

    from lightning_qat.model.inputs import as_float32

    if given is not None:
        return example_inputs(given)
    if isinstance(said.get("example_inputs"), list):
        return torch.zeros(said["example_inputs"])
    if getattr(module, "example_input_array", None) is None:
        raise ValueError(
            f"{type(module).__name__} has no example_input_array, so the inputs of its forward "
            "must be given: --example-inputs 1,3,224,224, or a file of arrays by the names of its "
            "arguments, as np.savez('inputs.npz', x=array) writes."
        )
    return as_float32(module.example_input_array)
