"""The short form of ``python -m reliability.soak``."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

from lightning_qat.numerics.kernels import build, library_cache
from lightning_qat.report.run_record import MOST_LOSSES
from reliability.soak import memory, starts
from reliability.soak.exports import left_by
from reliability.soak.memory import live_tensors
from reliability.soak.training import EVERY, Run, fit
from reliability.soak.trend import trend


def test_a_line_through_noise_is_found_and_noise_has_none() -> None:
    noise = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0, 5.0, 3.0] * 5
    found = trend([value + index for index, value in enumerate(noise)])
    assert 40 < found.change < 58
    assert not found.none
    assert trend(noise).none


def test_tensors_without_data_that_a_tracer_left_are_counted_and_have_no_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.ones(1_000)
    found = [x, x[1:], torch._to_functional_tensor(x), x.to("meta")]
    found.append(FakeTensorMode().from_tensor(x))
    with FunctionalTensorMode():
        found.append(FunctionalTensor.to_functional(x))
    monkeypatch.setattr(memory.gc, "get_objects", lambda: [*found, "no tensor"])
    assert live_tensors() == (6, 4_000)


@pytest.mark.filterwarnings("ignore")  # Lightning's advice, on a run that is not for training
def test_a_fit_through_all_phases_keeps_nothing_of_its_batches_but_some_losses() -> None:
    seen = fit(Run(steps=200, settle=100), exporters=())
    assert seen.phases == {"1": 0, "2": 10, "3": 50, "4": 75}
    assert seen.tensors
    # Step 100 is the first look. A batch has two tensors; a loss that is kept has two as well.
    losses = 2 * min(MOST_LOSSES, EVERY)
    assert seen.tensors[-1] - seen.tensors[0] <= losses + 8


def test_conversions_and_exports_leave_no_object_behind() -> None:
    """To ``cann``, whose way begins with that of ``fake_quant_onnx``."""
    left = left_by("cann", 14)
    assert left.rounds == 14
    assert left.own == {}
    # torch keeps the source of every graph that it compiles (torch.fx).
    assert left.process.keys() <= {"sources in linecache"}


@pytest.mark.skipif(
    build.compiled_loops() is None or library_cache.fcntl is None,
    reason="no C compiler with OpenMP, or no file locks, on this machine",
)
def test_another_process_compiles_when_the_one_that_compiles_is_killed(tmp_path: Path) -> None:
    assert starts.killed(tmp_path, processes=3) == starts.Started(2, left=_one(tmp_path))


def _one(folder: Path) -> list[str]:
    """The name of the only library in the cache."""
    return [file.name for file in (folder / "cache").rglob("*.so")]
