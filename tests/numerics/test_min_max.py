"""The range of a tensor that does not lie in memory in the order of its axes."""

import pytest
import torch

from lightning_qat.numerics.min_max import batch_range


@pytest.mark.parametrize("samples", [None, 64])
def test_it_is_found_in_a_graph_of_open_sizes(samples: int | None) -> None:
    def of_heads(x: torch.Tensor) -> torch.Tensor:
        return batch_range(x.transpose(1, 2), samples)

    compiled = torch.compile(of_heads, backend="eager", fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 4, 64)
        assert torch.equal(compiled(x), of_heads(x))
    assert torch.equal(
        of_heads(torch.tensor([[[-3.0, 1.0], [2.0, 0.0]]])), torch.tensor([3.0, 2.0])
    )
