"""Commands that try to break lightning-qat for hours; docs/reliability.md has their results."""
