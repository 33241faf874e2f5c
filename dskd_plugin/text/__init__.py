"""Tokens as bytes, and which tokens of two tokenizers stand at the same place of a text.

From a row of tokens to pairs: `responses` finds the answers in it and the ways to read them, `response_text` spells
them, `comparisons` says how two spellings are compared and `stretches` what they share where they differ, `matching`
puts the responses of both sides together, `align` pairs their tokens by where they are `placed`. `vocabularies` makes
the token tables of `tokens`; `pieces` makes events of two vocabularies, `respelled` a matrix and `prefix_maps` maps.
"""
