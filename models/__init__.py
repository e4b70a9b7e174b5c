"""Architectures, their norm layers and activation points."""
