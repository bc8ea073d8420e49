"""The exports of a run: its options, the trial before it, the files after it, what if they fail."""
