"""What a training will take, before any weight is loaded: a dry run on the meta device."""
