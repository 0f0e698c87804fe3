"""One folder a model family: everything that is true of one family, and of no other, stands there."""
