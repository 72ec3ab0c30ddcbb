"""Stage two: streams packed shards into Lightning models."""
