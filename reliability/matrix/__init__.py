"""Which versions work: an environment for each row of one table, and the tests that tell."""
