"""scikit-learn's digits: 8x8 pictures, a small depthwise-separable network."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from benchmarks.accuracy.task import Data, Task


def block(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    """Convolution, batch norm, relu."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def network(width: int = 16) -> nn.Module:
    """Depthwise-separable, 8x8 pictures to 10 classes."""
    w = width
    return nn.Sequential(
        block(1, w, 3),
        *(block(w, w, 3, groups=w), block(w, 2 * w, 1)),
        *(block(2 * w, 2 * w, 3, 2, groups=2 * w), block(2 * w, 4 * w, 1)),
        *(block(4 * w, 4 * w, 3, 2, groups=4 * w), block(4 * w, 4 * w, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, 10)),
    )


def data(seed: int) -> Data:
    """Half of the pictures to train, half to test, per class."""
    pictures, labels = load_digits(return_X_y=True)
    halves = train_test_split(pictures, labels, test_size=0.5, stratify=labels, random_state=seed)
    x, x_test = (torch.tensor(h, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16 for h in halves[:2])
    y, y_test = (torch.tensor(h) for h in halves[2:])
    return Data(x, y, x_test, y_test)


DIGITS = Task("digits, depthwise-separable", "accuracy", data, network, held_out=8)
