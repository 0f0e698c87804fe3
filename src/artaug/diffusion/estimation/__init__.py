"""Memory and time of a training, estimated by a dry run on the meta device before any weights are loaded."""
