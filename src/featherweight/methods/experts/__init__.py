"""Mixtures of experts: made from dense feed-forwards, and made smaller."""
