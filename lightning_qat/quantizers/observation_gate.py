"""Which forwards train a model: what decides whether its ranges follow a batch.

The mode of a layer does not: a frozen backbone is in eval mode while the rest of the model trains,
and its ranges must follow the training data all the same.
"""

from __future__ import annotations

from lightning_qat.function_hooks.running import running


class ObservationGate:
    """Opened by a training loop for its training batches, shared by all quantizers of a model.

    Attributes:
        open: A training batch is running.
        trains_in_eval: The model is in eval mode in its training batches, as a whole. A model that
            is not goes into eval mode within a batch to evaluate, which is not observed.
    """

    def __init__(self) -> None:
        self.open = False
        self.trains_in_eval = False

    def lets_through(self, root_training: bool | None) -> bool:
        """Whether a forward trains the model.

        Args:
            root_training: The mode of the model; ``None``: a part of it was called alone.
        """
        return self.open and (self.trains_in_eval or root_training is not False)

    def __deepcopy__(self, memo: object) -> None:
        """A copy of a model has no gate: nobody opens it for the copy, whose own mode decides."""


def is_training_forward(gate: ObservationGate | None, own_mode: bool) -> bool:
    """Whether the forward that runs now trains the model.

    Without a gate the mode of the module that was called decides for all modules inside it: that of
    the model in ``model(x)``, that of the backbone in ``model.backbone(x)``.

    Args:
        gate: The gate of a training loop.
        own_mode: The mode of the quantizer itself, for layers that are called outside any model.
    """
    now = running()
    if now.evaluating:
        return False
    called = now.frames[0] if now.frames else None
    if gate is None:
        return own_mode if called is None else called.training
    return gate.lets_through(called.training if called is not None and called.is_root else None)
