"""The backend that converts with TinyNeuralNetwork."""
