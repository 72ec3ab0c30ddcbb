"""What is known of a run before anything is spent on it."""
