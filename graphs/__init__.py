"""Reasoning graphs as LangGraph state machines, and how they are played."""
