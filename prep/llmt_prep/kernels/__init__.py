"""Bare loops over arrays: they take arrays and numbers, return arrays, and neither check nor log."""
