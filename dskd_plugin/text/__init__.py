"""Tokens as bytes, and which tokens of two tokenizers stand at the same place of a text.

From a row of tokens to pairs: `segments` finds the responses and the ways to read them, `texts` spells them,
`comparisons` says how two spellings are compared and `stretches` what they share where they differ, `matching` puts
the responses of both sides together, `align` pairs their tokens. `vocabularies` makes the token tables of `tokens`;
`pieces` makes events of two vocabularies.
"""
