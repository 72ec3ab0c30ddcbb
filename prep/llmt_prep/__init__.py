"""Stage one: raw documents to packed, memory-mapped shards. Never loads torch."""
