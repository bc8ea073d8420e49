"""Inputs that commands take from files: arrays by name, or a shape."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_qat.ir.quantized_model import QuantizedModel
    from lightning_qat.model.inputs import Inputs

_SHAPE = re.compile(r"\d+([,x]\d+)*")


def example_inputs(source: str) -> Inputs:
    """The inputs of a module's ``forward``.

    Args:
        source: The shape of one float tensor, such as ``1,3,224,224`` or ``1x3x224x224``, which
            will be noise; or an ``.npz`` file with an array per argument, by the argument's name,
            or without names (``np.savez(file, first, second)``) in order.

    Returns:
        A tensor, a tuple, or tensors by name; floating ones in float32.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no file of named arrays.
    """
    import torch

    from lightning_qat.export.named_arrays import read_arrays

    if _SHAPE.fullmatch(source):
        sizes = [int(size) for size in re.split("[,x]", source)]
        return torch.randn(sizes, generator=torch.Generator().manual_seed(0))
    arrays = {name: _tensor(array) for name, array in read_arrays(Path(source)).items()}
    # How np.savez names what has no name.
    if arrays.keys() == {f"arr_{number}" for number in range(len(arrays))}:
        return tuple(arrays[f"arr_{number}"] for number in range(len(arrays)))
    return arrays


def model_inputs(model: QuantizedModel, path: Path) -> Inputs:
    """Arrays of an ``.npz`` file in the form of a converted model's example.

    Args:
        model: The converted model.
        path: A file with an array for each of its inputs, by name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no file of named arrays, or their names are not the model's.
    """
    from torch import Tensor
    from torch.utils import _pytree as pytree

    from lightning_qat.export.named_arrays import read_arrays
    from lightning_qat.model.inputs import Call

    arrays = read_arrays(path)
    if arrays.keys() != set(model.input_names):
        raise ValueError(
            f"{str(path)!r} must hold an array for each of the model's inputs, "
            f"{', '.join(map(repr, model.input_names))}; it holds "
            f"{', '.join(map(repr, arrays)) or 'none'}. "
            f"Write it with np.savez(file, {'=..., '.join(model.input_names)}=...)."
        )
    given = iter(_tensor(arrays[name]) for name in model.input_names)
    call = pytree.tree_map_only(Tensor, lambda _: next(given), model.example_inputs)
    return Call(*call)


def _tensor(array: Any) -> Any:
    import torch

    tensor = torch.from_numpy(array)
    return tensor.float() if tensor.is_floating_point() else tensor
