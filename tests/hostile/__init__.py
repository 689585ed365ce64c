"""Bad input of every kind, and the worker process that tries it: see `worker`."""
