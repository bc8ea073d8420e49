"""What an architecture of the zoo is: a name, and a function that builds it with its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[Any, ...] | dict[str, Any]
Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Architecture:
    """One architecture, small, with random weights.

    Args:
        build: Makes the model.
        inputs: Makes one batch of inputs, of torch's random state.
        outputs: Names of the outputs that are trained and exported; all of them by default.
    """

    build: Build
    inputs: Callable[[], Inputs]
    outputs: tuple[str, ...] = ()


def images(size: int, channels: int = 3, batch: int = 2) -> Callable[[], Inputs]:
    """Random images (batch, channels, size, size)."""
    return lambda: (torch.randn(batch, channels, size, size),)


def tokens(vocabulary: int, length: int, batch: int = 2) -> Tensor:
    """Random token numbers (batch, length)."""
    return torch.randint(0, vocabulary, (batch, length))


@dataclass
class Registry:
    """Architectures of one library by name, ``library/name``."""

    library: str
    found: dict[str, Architecture] = field(default_factory=dict)

    def add(
        self,
        name: str,
        build: Build,
        inputs: Callable[[], Inputs],
        outputs: tuple[str, ...] = (),
    ) -> None:
        """Add one architecture."""
        self.found[f"{self.library}/{name}"] = Architecture(build, inputs, outputs)


class Selected(nn.Module):
    """A model that gives some of what another one returns, as a tuple.

    Args:
        model: Returns a mapping, such as the outputs of ``transformers``.
        names: Keys of what is wanted.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Run the model."""
        returned: Mapping[str, Tensor] = self.model(*args, **kwargs)
        return tuple(returned[name] for name in self.names)
