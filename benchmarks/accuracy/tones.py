"""Words of two sounds in noise, made from formulas, and convolutions over the waveform."""

from itertools import permutations
from math import pi

import torch
from torch import Tensor, nn

from benchmarks.accuracy.task import Data, Task

SAMPLES, SOUND = 512, 192
TRAINED, TESTED = 8192, 2048
PAIRS = torch.tensor([*permutations(range(4), 2)])
"""A word is two different sounds in their order: 12 words."""


def data(seed: int) -> Data:
    """Words in noise; inputs (words, 1, samples)."""
    generator = torch.Generator().manual_seed(seed)
    made = [words(count, generator) for count in (TRAINED, TESTED)]
    return Data(*made[0], *made[1])


def words(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Waveforms and which pair each of them is."""

    def draw() -> Tensor:
        return torch.rand(count, 1, generator=generator)

    y = torch.randint(len(PAIRS), (count,), generator=generator)
    x = 0.6 * torch.randn(count, SAMPLES, generator=generator)
    time = torch.arange(SOUND) / SOUND
    for place in range(2):
        kind = PAIRS[y, place][:, None]
        pitch = 8 + 12 * draw()
        phase = 2 * pi * draw()
        cycles = torch.stack(
            [
                pitch * time * (1 + time),  # rises
                pitch * time * (3 - time),  # falls
                pitch * time * 2,  # stays
                pitch * time * 2 + 0.8 * torch.sin(2 * pi * 5 * time),  # trembles
            ]
        ).gather(0, kind.expand(count, SOUND)[None])[0]
        sound = (0.6 + 0.8 * draw()) * torch.sin(2 * pi * cycles + phase) * torch.sin(pi * time)
        start = place * SAMPLES // 2 + (draw() * (SAMPLES // 2 - SOUND)).long()
        x.scatter_add_(1, start + torch.arange(SOUND), sound)
    return x[:, None], y


def network(width: int = 16) -> nn.Module:
    """A wide convolution with a stride, three depthwise-separable ones, the mean over time."""
    layers: list[nn.Module] = []
    sizes = [(1, width, 17, 4, 1)]
    for inputs, outputs in ((width, 2 * width), (2 * width, 4 * width), (4 * width, 4 * width)):
        sizes += [(inputs, inputs, 9, 2, inputs), (inputs, outputs, 1, 1, 1)]
    for inputs, outputs, kernel, stride, groups in sizes:
        layers += [
            nn.Conv1d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm1d(outputs),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width * 16, len(PAIRS)))


TONES = Task("tones, 1-D convolutions", "accuracy", data, network, float_epochs=15, epochs=4)
