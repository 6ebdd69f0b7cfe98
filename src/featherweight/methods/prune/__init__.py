"""Pruning: connections, neurons and channels that are taken away."""
