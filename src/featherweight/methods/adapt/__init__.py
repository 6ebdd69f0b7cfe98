"""Adapters: few parameters that are trained beside a base which stays as it is."""
