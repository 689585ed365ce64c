"""Which keys a mask hides, proven by structure: predicates over indices, and the reader that finds them."""
