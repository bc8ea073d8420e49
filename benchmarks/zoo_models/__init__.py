"""Architectures that we did not write, small and with random weights, for ``benchmarks.zoo``."""

from __future__ import annotations

from benchmarks.zoo_models.entry import Architecture


def all_architectures() -> dict[str, Architecture]:
    """Every architecture by name, ``library/name``; nothing of the libraries is imported yet."""
    from benchmarks.zoo_models import (
        smp_models,
        timm_models,
        torchvision_models,
        transformers_models,
        written_models,
    )

    rooms = (written_models, transformers_models, smp_models, torchvision_models, timm_models)
    return {name: one for room in rooms for name, one in room.REGISTRY.found.items()}
