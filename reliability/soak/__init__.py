"""Long runs: what grows, what slows down, what races."""
