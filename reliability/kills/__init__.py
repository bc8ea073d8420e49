"""Training runs and their exports are killed at random moments; nothing may be lost or untrue."""
