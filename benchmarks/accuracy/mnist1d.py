"""MNIST-1D (Greydanus, arXiv:2011.14439): a line of 40 numbers per digit, made by its authors."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy.task import Data, Task


def data(seed: int) -> Data:
    """4000 to train, as in the paper, and 4000 to test.

    Raises:
        SystemExit: The package ``mnist1d`` is not installed.
    """
    try:
        # Not by `import`: type checkers would say other things where it is installed.
        mnist1d: Any = import_module("mnist1d.data")
    except ImportError as error:
        text = f"{error}. The task mnist1d needs pip install 'lightning-qat[bench]'."
        raise SystemExit(text) from error
    arguments = mnist1d.get_dataset_args()
    arguments.num_samples, arguments.train_split, arguments.seed = 8000, 0.5, seed
    made = mnist1d.make_dataset(arguments)
    x, x_test = (torch.tensor(made[k], dtype=torch.float32)[:, None] for k in ("x", "x_test"))
    y, y_test = (torch.tensor(made[k]) for k in ("y", "y_test"))
    return Data(x, y, x_test, y_test)


def network(width: int = 32) -> nn.Module:
    """Four convolutions over a line of 40 numbers, to 10 classes."""
    sizes = [(1, width, 5, 1), (width, 2 * width, 3, 2), *[(2 * width, 2 * width, 3, 2)] * 2]
    blocks = [
        nn.Sequential(
            nn.Conv1d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm1d(outputs),
            nn.ReLU(),
        )
        for inputs, outputs, kernel, stride in sizes
    ]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(2 * width * 5, 10))


class Recurrent(nn.Module):
    """A GRU along the line, both ways, and a linear layer on its last outputs."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.rnn = nn.GRU(1, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, 10) of lines (batch, 1, 40)."""
        outputs, _ = self.rnn(x.transpose(1, 2))
        forwards, backwards = outputs.chunk(2, -1)
        logits: Tensor = self.head(torch.cat((forwards[:, -1], backwards[:, 0]), -1))
        return logits


MNIST1D = Task("MNIST-1D, convolutions", "accuracy", data, network, float_epochs=10)
MNIST1D_GRU = Task("MNIST-1D, GRU", "accuracy", data, Recurrent, float_epochs=30, float_rate=5e-3)
