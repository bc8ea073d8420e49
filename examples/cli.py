"""LightningCLI: the whole run, quantization included, in one YAML file.

    python -m examples.cli fit --config examples/cli.yaml
    python -m examples.cli fit --config examples/cli.yaml --trainer.max_epochs 2
    python -m examples.cli fit --config examples/cli.yaml --print_config

Needs jsonargparse: pip install "lightning-qat[cli]". Unknown keys and misspelt presets stop the
program when the file is parsed.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.cli import LightningCLI

import examples.digits  # noqa: F401  the classes that the file names


def main(args: Sequence[str] | None = None) -> LightningCLI:
    """Run a command; by default the shell's. The configuration is not saved beside the files."""
    return LightningCLI(args=args if args is None else [*args], save_config_callback=None)


if __name__ == "__main__":
    main()
