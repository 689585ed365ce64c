"""Model in, model out: find attention over caches, decide what can go, emit the ops. Nothing is run here."""
