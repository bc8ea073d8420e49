"""Compare a file with the model it was made of, tensor by tensor."""
