"""Methods: one file each, acting in four stages of the training step."""
