"""The proof engine behind the families: from a softmax, or an operator, to what attention reads and gives."""
