"""Looking at a store: status, counts, the gallery, and what describing all of it will cost."""
