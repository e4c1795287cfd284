"""What stands beside the loops of the two training scripts."""
