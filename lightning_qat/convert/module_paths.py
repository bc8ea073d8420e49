"""Name the modules in a captured graph by their paths in the model."""

from __future__ import annotations

import re
from functools import cache

import torch
from torch import nn
from torch.export import ExportedProgram

_SLICE = re.compile(r"slice\((None|-?\d+), (None|-?\d+), (None|-?\d+)\)")


def use_module_paths(program: ExportedProgram, model: nn.Module) -> None:
    """Give every node the module paths of ``named_modules()``, in place.

    torch.export names a layer that a slice was asked for after the slice, where a model has shared
    modules: ``layers.slice(1, None, None).0`` is ``layers.1``.

    Args:
        program: What torch.export made of the model.
        model: The model.
    """
    path_of = cache(lambda path: module_path(model, path))
    for graph_module in program.graph_module.modules():
        for node in (
            graph_module.graph.nodes if isinstance(graph_module, torch.fx.GraphModule) else ()
        ):
            stack = node.meta.get("nn_module_stack")
            if stack:
                node.meta["nn_module_stack"] = {
                    call: (path_of(path), *kind) for call, (path, *kind) in stack.items()
                }


def module_path(model: nn.Module, path: str) -> str:
    """The path of a module in a model, from one that may go through slices of lists.

    Args:
        model: The model.
        path: ``layers.slice(1, None, None).0.fc``; a slice itself gets the path of its list.

    Example:
        >>> model = nn.ModuleDict({"layers": nn.ModuleList(nn.ReLU() for _ in range(3))})
        >>> module_path(model, "layers.slice(1, None, None).0"), module_path(model, "layers.2")
        ('layers.1', 'layers.2')
    """
    if "slice(" not in path:
        return path
    found: list[str] = []
    module: nn.Module | None = model
    # The children of a slice by the names that they have in it; ``None``: no slice.
    sliced: dict[str, str] | None = None
    for part in path.split("."):
        ends = _SLICE.fullmatch(part)
        if ends is not None and module is not None:
            children = {name: name for name in module._modules} if sliced is None else sliced
            which = slice(*(None if end == "None" else int(end) for end in ends.groups()))
            names = list(children)[which]
            kept = [children[name] for name in names]
            # A Sequential's slice keeps the names, a list's counts anew.
            own = names if isinstance(module, nn.Sequential) else map(str, range(len(kept)))
            sliced = dict(zip(own, kept, strict=True))
            continue
        name = part if sliced is None else sliced.get(part, part)
        sliced = None
        found.append(name)
        module = module._modules.get(name) if module is not None else None
    return ".".join(found)
