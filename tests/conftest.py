"""A seed for every test, everything process-wide as it was afterwards, and no network."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_qat.function_hooks.running import forget_running, running
from tests import torch_once
from tests.no_network.sitecustomize import block_network

block_network()


def pytest_configure() -> None:
    # A Python that a test starts imports ``sitecustomize``, which blocks its network, too.
    folder = str(Path(__file__).parent / "no_network")
    given = os.environ.get("PYTHONPATH")
    if folder not in (given or "").split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, given)))


def pytest_collection_finish() -> None:
    torch_once.remember()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """``@pytest.mark.cuda``, or ``cuda(devices=2)``: skip where there are fewer CUDA devices."""
    marker = item.get_closest_marker("cuda")
    if marker is not None:
        needed = marker.kwargs.get("devices", 1)
        if torch.cuda.device_count() < needed:
            pytest.skip(f"needs {needed} CUDA device{'s' * (needed > 1)}: python -m benchmarks.gpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def _same_process_afterwards() -> Iterator[None]:
    environment = dict(os.environ)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    grad = torch.is_grad_enabled()
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_grad_enabled(grad)


@pytest.fixture(autouse=True)
def _no_forward_is_left_running() -> Iterator[None]:
    """An exception in a forward must not leave its frames behind."""
    yield
    left = running().forward_cache is not None or bool(running().frames)
    forget_running()
    assert not left
