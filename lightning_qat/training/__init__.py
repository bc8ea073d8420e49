"""Functions for training loops: phases, range synchronisation, weights quantized once."""
