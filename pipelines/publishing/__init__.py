"""From a run to the model hub."""
