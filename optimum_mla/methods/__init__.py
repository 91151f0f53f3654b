"""The methods, one idea a file. A method answers with shapes and tensors, and holds options only."""
