"""Characters of Python's manual, which comes with Python, and a small transformer."""

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy.task import Data, Task

LENGTH, VOCABULARY = 48, 64
TRAINED, TESTED = 3072, 1024


def data(seed: int) -> Data:
    """Sequences (count, length) of characters and what follows each; the last fifth is to test."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics)).lower()
    common = [letter for letter, _ in Counter(text).most_common(VOCABULARY - 1)]
    codes = {letter: code for code, letter in enumerate(common)}
    written = torch.tensor([codes.get(letter, VOCABULARY - 1) for letter in text])
    generator = torch.Generator().manual_seed(seed)
    cut = len(written) * 4 // 5
    parts = []
    for part, count in ((written[:cut], TRAINED), (written[cut:], TESTED)):
        starts = torch.randint(len(part) - LENGTH, (count, 1), generator=generator)
        sequences = part[starts + torch.arange(LENGTH + 1)]
        parts += [sequences[:, :-1], sequences[:, 1:]]
    return Data(*parts)


class Block(nn.Module):
    """Attention to what came before and two linear layers, with norms in front."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_linear = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.linear = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Of the same shape, (batch, length, width)."""
        normed = self.before_attention(x)
        query, key, value = (
            layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        result: Tensor = x + self.linear(self.before_linear(x))
        return result


class Transformer(nn.Module):
    """Two blocks, learned places."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.letters = nn.Embedding(VOCABULARY, width)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.blocks = nn.Sequential(Block(width, 3), Block(width, 3))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary) of codes (batch, length)."""
        logits: Tensor = self.head(self.norm(self.blocks(self.letters(x) + self.places)))
        return logits


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every character."""
    return F.cross_entropy(outputs.flatten(0, 1), labels.flatten())


TEXT = Task(
    "text, transformer",
    "next character",
    data,
    Transformer,
    float_epochs=12,
    epochs=4,
    loss=loss,
    held_out=1,
)
