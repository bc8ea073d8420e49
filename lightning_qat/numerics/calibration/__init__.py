"""From batches to a range: running updates, searches over one batch, a histogram of all."""
