"""Adapters that let other frameworks use Conda."""
