"""What a run shows, writes down and warns of."""
