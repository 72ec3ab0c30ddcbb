"""From rows to micro-batches."""
