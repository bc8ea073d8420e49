"""What goes wrong in a run and can be seen in it, said once with a remedy."""
