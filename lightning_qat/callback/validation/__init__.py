"""A module's own validation as a function of the module, for what measures many variants of it."""
