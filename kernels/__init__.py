"""Attention operators shared by all families. None has moved in yet."""
