"""``QATCallback(memory="compact")``: the same training from fewer bytes."""

from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest

from lightning_qat import QATCallback
from lightning_qat.function_hooks.hooks import hooks_of
from lightning_qat.quantizers.weight import WeightQuantizer
from lightning_qat.training.range_sync import activation_quantizers
from tests.callback.tiny import Net, Planned, loader, qat, same


@pytest.mark.parametrize("kind", [Planned, Net])
def test_a_compact_run_is_the_fast_run_to_the_bit(
    trainer: Callable[..., L.Trainer], kind: type[Net], tmp_path: Path
) -> None:
    """Planned from example inputs, and from the first batch."""
    states, losses = [], []
    for memory in ("fast", "compact"):
        L.seed_everything(0, verbose=False)
        net = kind()
        options = {"exporters": ["fake_quant_onnx"], "export_dir": tmp_path / memory}
        trainer(qat(memory=memory, **options), max_epochs=3).fit(net, loader(), loader())
        states.append(net.state_dict())
        losses.append(net.losses)
    # The one that was made last is compact throughout.
    assert all(q.compact for q in activation_quantizers(net).values())
    assert all(m.compact for m in net.modules() if isinstance(m, WeightQuantizer))
    watching = [i for i in map(hooks_of, net.modules()) if i is not None]
    assert watching
    assert all(i.plan.compact for i in watching)
    assert losses[0] == losses[1]
    assert same(*states)


def test_another_word_is_refused_when_the_callback_is_made() -> None:
    with pytest.raises(ValueError, match="memory must be 'fast' or 'compact'; got 'low'"):
        QATCallback(memory="low")  # type: ignore[arg-type]
