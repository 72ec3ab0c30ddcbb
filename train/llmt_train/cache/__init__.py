"""Chunks of a dataset below a URL, kept on this machine: bounded, shared by its processes, fetched ahead."""
