"""Checkpoints as folders: load, inspect, compose, convert, export and publish them."""
