"""What is read of a manifest, as types; what ``export_all`` writes beyond is let be."""

from __future__ import annotations

from typing_extensions import TypedDict


class ListedFile(TypedDict):
    """A file of a target; ``path`` is within the folder, with ``/``."""

    path: str
    sha256: str


class StoredOutput(TypedDict):
    """``OutputAgreement``, as far as it is shown."""

    output: str
    max_steps: float
    mean_steps: float
    fraction_differing: float
    same_argmax: float | None


class StoredRuntime(TypedDict):
    """``RuntimeAgreement``."""

    runtime: str
    outputs: list[StoredOutput]


class _SinceLater(TypedDict, total=False):
    source: str
    cautions: list[str]
    remarks: list[str]


class StoredAgreement(_SinceLater):
    """``Agreement``, as far as it is shown."""

    parameter_differences: list[str] | None
    samples: int
    runtimes: list[StoredRuntime]


class ListedTarget(TypedDict, total=False):
    """A target: its files, or its error, or both."""

    files: dict[str, ListedFile]
    notes: list[str]
    differences: list[str]
    agreement: StoredAgreement
    error: str


class StoredTraining(TypedDict, total=False):
    """What a run has said; see ``run_facts``."""

    loss: list[tuple[int, float]]
    phases: list[tuple[int, str]]
    weight_sqnr_db: dict[str, float]
    left_float: list[tuple[str, str, str]]


class _Facts(TypedDict, total=False):
    recipe: dict[str, object]
    versions: dict[str, str]
    python: str
    inputs: list[str]
    input_shapes: dict[str, list[int | str]]
    outputs: list[str]
    training: StoredTraining


class StoredManifest(_Facts):
    """A manifest."""

    targets: dict[str, ListedTarget]
