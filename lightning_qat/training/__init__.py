"""What a training loop calls: phases, range synchronisation, weights quantized once."""
