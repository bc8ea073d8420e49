"""Reference executor: runs deploy files in NumPy, bit for bit as the operators are specified."""
