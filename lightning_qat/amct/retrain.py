"""AMCT's functions for retraining, by their names: for scripts that were written for AMCT.

``import lightning_qat.amct as amct`` stands in for ``import amct_pytorch as amct``: configuration,
model, restored model and saved model come from the same calls, with the same files. What differs is
said at each function. Nothing here needs AMCT.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from lightning_qat.atomic_write import replacing
from lightning_qat.checkpoint.contents import is_quantized, missing_problem
from lightning_qat.convert.convert import check_capture, convert
from lightning_qat.export.export import export
from lightning_qat.export.load import load_exporter
from lightning_qat.export.protocol import Artifact
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.model.inputs import Inputs
from lightning_qat.model.paths import ModelPaths
from lightning_qat.prepare.prepare import prepare
from lightning_qat.prepare.report import PrepareReport
from lightning_qat.prepare.swap import choose_layers
from lightning_qat.recipe.amct_config import json_config
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.torch_files.load import load_without_objects

DynamicAxes = Mapping[str, Mapping[int, str] | Sequence[int]]


def create_quant_retrain_config(
    config_file: str | Path,
    model: nn.Module,
    input_data: Inputs,
    config_defination: str | Path | None = None,
) -> PrepareReport:
    """Write the JSON configuration of a network: every layer that can be quantized, and how.

    Args:
        config_file: The file to write; a file that is there is replaced.
        model: The float model; it stays as it is.
        input_data: What its ``forward`` takes. The model is captured with it as the export will do,
            so that a network that cannot be exported is found out before training.
        config_defination: AMCT's simple configuration (``.cfg``); AMCT's defaults without one.

    Returns:
        Which layers the file enables, and which stay float and why.

    Raises:
        ValueError: The simple configuration breaks a rule or names a layer that the model does not
            have, a Linear shall have a scale per channel, or nothing can be quantized.
        CaptureError: The model cannot be exported.
    """
    recipe = _amct_recipe("amct" if config_defination is None else config_defination)
    report = choose_layers(ModelPaths.of(model), recipe)
    layers = {s.name: (asdict(s.spec.activation), asdict(s.spec.weight)) for s in report.swapped}
    kinds = {s.name: s.kind for s in report.swapped}
    values = json_config(recipe.activation.calibration_batches, layers, kinds)
    _check_export(model, recipe, input_data)
    with replacing(Path(config_file)) as temporary:
        text = json.dumps(values, indent=4, separators=(",", ":"))
        temporary.write_text(text, encoding="utf-8")
    return report


def create_quant_retrain_model(
    config_file: str | Path, model: nn.Module, record_file: str | Path, input_data: Inputs
) -> nn.Module:
    """Turn the layers that a configuration enables into QAT layers.

    The model itself is changed, and returned: ``model`` and the result are the same object.
    Calibration takes the first ``batch_num`` training batches; batches in eval mode never count.

    Args:
        config_file: The JSON configuration.
        model: The float model.
        record_file: Where ``save_quant_retrain_model`` will write the factors. Unlike AMCT's it is
            written then, with the factors of the files, and not at the first evaluation.
        input_data: What ``forward`` takes; see ``create_quant_retrain_config``.

    Returns:
        ``model``, ready for training.

    Raises:
        ValueError: The configuration breaks a rule or names a layer that the model does not have.
            The model is unchanged then.
        CaptureError: The model cannot be exported. The model is unchanged then.
    """
    recipe = _amct_recipe(config_file)
    _check_export(model, recipe, input_data)
    Path(record_file).parent.mkdir(parents=True, exist_ok=True)
    prepare(model, recipe)
    return model


def restore_quant_retrain_model(
    config_file: str | Path,
    model: nn.Module,
    record_file: str | Path,
    input_data: Inputs,
    pth_file: str | Path,
    state_dict_name: str | None = None,
) -> nn.Module:
    """Continue an interrupted run: the QAT model with its weights and learned clips.

    Nothing that the checkpoint has calibrated is calibrated again.

    Args:
        config_file: The JSON configuration the run was started with.
        model: The float model.
        record_file: As for ``create_quant_retrain_model``.
        input_data: As for ``create_quant_retrain_model``.
        pth_file: What ``torch.save`` wrote: the QAT model's ``state_dict``, or a mapping that holds
            it. Names may begin with ``module.``, as DistributedDataParallel names them.
        state_dict_name: The state_dict's key in such a mapping.

    Returns:
        ``model``, ready for further training or evaluation.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It holds no state_dict of this QAT model, or as ``create_quant_retrain_model``.
    """
    state = _state_dict(Path(pth_file), state_dict_name)
    create_quant_retrain_model(config_file, model, record_file, input_data)
    missing = missing_problem(state, model)
    if missing is not None:
        raise ValueError(f"{str(pth_file)!r}: {missing}")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{str(pth_file)!r} must be of the model and the configuration that are given: {error}"
        ) from error
    return model


def save_quant_retrain_model(
    config_file: str | Path,
    model: nn.Module,
    record_file: str | Path,
    save_path: str | Path,
    input_data: Inputs,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_axes: DynamicAxes | None = None,
) -> Artifact:
    """Write ``<save_path>_deploy_model.onnx``, ``<save_path>_fake_quant_model.onnx``, the record.

    The model is not touched and can be trained further.

    Args:
        config_file: The JSON configuration the model was made with.
        model: The trained QAT model, also wrapped in DistributedDataParallel.
        record_file: The factors of every layer, made now from the model as it is.
        save_path: Folder and beginning of the two models' names.
        input_data: What ``forward`` takes.
        input_names: Of the inputs, in order; those of ``forward``'s arguments by default.
        output_names: Of the outputs, in order.
        dynamic_axes: As for ``torch.onnx.export``, of the first dimension only; without it every
            size is that of ``input_data``.

    Returns:
        The files; its notes say which layers keep real values, and why.

    Raises:
        ValueError: Layers that the configuration enables are not quantized in the model or have
            seen too few batches, or names do not fit.
        CaptureError: The model cannot be captured.
        UnsupportedByTarget: With everything that the format cannot express.
    """
    recipe = _amct_recipe(config_file)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    left = [s.name for s in choose_layers(ModelPaths.of(model), recipe).swapped]
    if left:
        raise ValueError(
            f"Every layer that {str(config_file)!r} enables must be a QAT layer of the model; "
            f"{left} are float. Save what create_quant_retrain_model gave."
        )
    dynamic = _dynamic_batch(dynamic_axes)
    quantized = convert(model, input_data, recipe=recipe, dynamic_batch=dynamic)
    quantized = _renamed(quantized, input_names, output_names)
    unknown = sorted(set(dynamic_axes or ()) - {*quantized.input_names, *quantized.output_names})
    if unknown:
        raise ValueError(
            f"dynamic_axes must name inputs and outputs, {[*quantized.input_names]} and "
            f"{[*quantized.output_names]}; got {unknown}."
        )
    artifact = export(quantized, _cann(int4_weights=True), save_path)
    written = artifact.files["record"]
    with replacing(Path(record_file)) as temporary:
        temporary.write_bytes(written.read_bytes())
    if written.resolve() != Path(record_file).resolve():
        written.unlink()
    return replace(artifact, files={**artifact.files, "record": Path(record_file)})


def _amct_recipe(source: str | Path) -> Recipe:
    # AMCT quantizes the inputs of layers and nothing else.
    return replace(Recipe.load(source), joins=False, outputs=False)


def _check_export(model: nn.Module, recipe: Recipe, input_data: Inputs) -> None:
    trial = copy.deepcopy(model)
    prepare(trial, recipe)
    check_capture(trial, input_data)


def _state_dict(path: Path, name: str | None) -> dict[str, Any]:
    loaded = load_without_objects(path)
    if name is not None:
        if not isinstance(loaded, Mapping) or name not in loaded:
            keys = sorted(map(str, loaded)) if isinstance(loaded, Mapping) else []
            raise ValueError(
                f"{str(path)!r} must hold a state_dict under {name!r}; it has the keys {keys}."
            )
        loaded = loaded[name]
    state = {}
    if isinstance(loaded, Mapping):
        state = {str(key).removeprefix("module."): value for key, value in loaded.items()}
    if not is_quantized(state):
        inside = [key for key, value in state.items() if isinstance(value, Mapping)]
        hint = f" Give state_dict_name, one of {inside}." if inside and name is None else ""
        raise ValueError(
            f"{str(path)!r} must hold the state_dict of a QAT model; no quantizer is in it.{hint}"
        )
    return state


def _dynamic_batch(axes: DynamicAxes | None) -> bool:
    further = {name: sorted(set(of) - {0}) for name, of in (axes or {}).items() if set(of) - {0}}
    if further:
        raise ValueError(
            f"dynamic_axes must name the first dimension (0) only; got {further}. Other sizes are "
            "those of input_data."
        )
    return bool(axes)


def _renamed(
    model: QuantizedModel, inputs: Sequence[str] | None, outputs: Sequence[str] | None
) -> QuantizedModel:
    for what, names, own in (
        ("input_names", inputs, model.input_names),
        ("output_names", outputs, model.output_names),
    ):
        if names is not None and (len(names) != len(own) or len(set(names)) < len(names)):
            raise ValueError(
                f"{what} must be {len(own)} different names, for {list(own)}; got {list(names)}."
            )
    return replace(
        model,
        input_names=model.input_names if inputs is None else tuple(inputs),
        output_names=model.output_names if outputs is None else tuple(outputs),
    )


def _cann(**options: Any) -> Any:
    return type(load_exporter("cann"))(**options)
