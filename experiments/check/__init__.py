"""Checks that this machine trains correctly, measures its speed, and estimates the hours of the papers' tables."""
