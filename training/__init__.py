"""Traces in, better policies out."""
