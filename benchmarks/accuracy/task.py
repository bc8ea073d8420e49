"""What a network learns in these benchmarks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH = 64


class Data(NamedTuple):
    """Inputs and labels to train with and to test with; the first dimension counts samples."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def right(outputs: Tensor, labels: Tensor) -> float:
    """The percentage of labels (...) that are the largest of the outputs (..., classes)."""
    return 100.0 * float((outputs.argmax(-1) == labels).float().mean())


@dataclass(frozen=True)
class Task:
    """Data, a network for them, and how it is trained.

    Args:
        title: For tables.
        measure: What the score is.
        data: Of a seed.
        network: An untrained one; its initial weights are those of the global generator.
        float_epochs: Of Adam, before anything is quantized.
        epochs: Of Adam, with quantization; the float network it is compared with has as many more.
        float_rate: Learning rate of the first part; falls to zero along a cosine, as does
        rate: that of the second part.
        loss: Of outputs and labels.
        score: Of outputs and labels, in percent.
        held_out: Seeds that choose the rate: the more, the less the rates differ.
    """

    title: str
    measure: str
    data: Callable[[int], Data]
    network: Callable[[], nn.Module]
    float_epochs: int = 40
    epochs: int = 10
    float_rate: float = 3e-3
    rate: float = 1e-3
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    score: Callable[[Tensor, Tensor], float] = right
    held_out: int = 2


def test_outputs(model: nn.Module, data: Data) -> Tensor:
    """What a network, in evaluation mode from here on, makes of the test data."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(x) for x in torch.split(data.x_test, 512)])


def score(task: Task, model: nn.Module, data: Data) -> float:
    """What a network, in evaluation mode from here on, reaches on the test data, in percent."""
    return task.score(test_outputs(model, data), data.y_test)
