"""Training logs of other programs, read as journals of this kit."""
