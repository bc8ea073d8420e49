"""What we may know of a user's module: paths under ``torch.compile``, inputs, one dry run."""
