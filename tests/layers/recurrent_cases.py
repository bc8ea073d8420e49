"""LSTM and GRU layers that the tests of recurrent layers share."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils import _pytree as pytree

from lightning_qat import prepare
from lightning_qat.layers import GRUQAT, LSTMQAT

STEPS, BATCH, FEATURES, HIDDEN = 5, 3, 3, 4
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lstm": (LSTMQAT, {}),
    "lstm projected": (LSTMQAT, {"proj_size": 2}),
    "gru": (GRUQAT, {}),
}


def float_layer(kind: str, **options: Any) -> Any:
    qat, more = KINDS[kind]
    return qat.float_class(FEATURES, HIDDEN, **more, **options)


def qat_layer(kind: str, **options: Any) -> Any:
    qat, more = KINDS[kind]
    return qat(FEATURES, HIDDEN, **more, **options)


def sequence(form: str, batch_first: bool = False) -> Any:
    if form == "one":
        return torch.randn(STEPS, FEATURES)
    shape = (BATCH, STEPS) if batch_first else (STEPS, BATCH)
    x = torch.randn(*shape, FEATURES)
    if form == "padded":
        return x
    lengths = torch.tensor([3, STEPS, 1])
    return pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False)


def initial_state(layer: Any, form: str) -> Any:
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    batch = () if form == "one" else (BATCH,)
    h = torch.randn(count, *batch, layer.proj_size or HIDDEN)
    return (h, torch.randn(count, *batch, HIDDEN)) if isinstance(layer, nn.LSTM) else h


def assert_same(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    ours, ours_spec = pytree.tree_flatten(found)
    theirs, spec = pytree.tree_flatten(expected)
    assert ours_spec == spec
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# In a model


class Tagger(nn.Module):
    """Linear, relu, a recurrent layer, and a head over all steps; takes (batch, time, 3)."""

    def __init__(self, kind: str = "lstm", batch_first: bool = True, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, FEATURES)
        self.rnn = float_layer(kind, batch_first=batch_first, **options)
        self.skip = nn.Linear(FEATURES, 2)
        width = (self.rnn.proj_size or HIDDEN) * (2 if self.rnn.bidirectional else 1)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.embed(x))
        output, _ = self.rnn(x)
        return self.head(output) + self.skip(x)


def trained(model: nn.Module, *inputs: Any, recipe: Any = "int8") -> nn.Module:
    prepare(model, recipe, inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        outputs = pytree.tree_leaves(model.train()(*inputs))
        sum(o.square().mean() for o in outputs).backward()  # type: ignore[union-attr]
        optimizer.step()
    return model.eval()
