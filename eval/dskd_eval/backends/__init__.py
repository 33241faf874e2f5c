"""Backends: a model in memory that tokenizes, renders a conversation and generates."""
