"""Many sequences at once on one model: requests in, streams of tokens out."""
