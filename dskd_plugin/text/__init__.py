"""Tokens as bytes, and which tokens of two tokenizers stand at the same place of a text."""
