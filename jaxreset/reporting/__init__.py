"""What a run shows: its progress, its curve, its reset trees."""
