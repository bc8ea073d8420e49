"""What each layer costs when it is quantized, and the recipe that follows from it."""
