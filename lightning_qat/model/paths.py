"""The modules of a model by the dotted paths that their author gave them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_qat.model.torch_compile import plain_path


@dataclass(frozen=True)
class ModelPaths:
    """Every module of a model and its paths, read once and handed to all who need them.

    A later change of the model (a new submodule) does not appear here; make a new one then.

    Attributes:
        by_path: Every module by its path, all aliases included, in the order of
            ``named_modules``. Paths do not contain the names that ``torch.compile`` inserts; its
            wrappers are left out.
        names: All paths of each module. The first one is the module's name; the others are aliases.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> model.append(model[0])
        Sequential(
          (0): Linear(in_features=2, out_features=2, bias=True)
          (1): Linear(in_features=2, out_features=2, bias=True)
        )
        >>> ModelPaths.of(model).names[model[0]]
        ('0', '1')
    """

    by_path: Mapping[str, nn.Module]
    names: Mapping[nn.Module, Sequence[str]]

    @classmethod
    def of(cls, model: nn.Module) -> ModelPaths:
        """Read the paths of a model; walks its modules once."""
        # A wrapper of torch.compile comes before what it wraps, and has the same plain path.
        by_path = {
            plain_path(path): module for path, module in model.named_modules(remove_duplicate=False)
        }
        names: dict[nn.Module, tuple[str, ...]] = {}
        for path, module in by_path.items():
            names[module] = (*names.get(module, ()), path)
        return cls(by_path, names)

    def name(self, module: nn.Module) -> str:
        """The first path of a module."""
        return self.names[module][0]


def modules_by_path(model: nn.Module) -> Mapping[str, nn.Module]:
    """``ModelPaths.of(model).by_path``, for a single look-up."""
    return ModelPaths.of(model).by_path
