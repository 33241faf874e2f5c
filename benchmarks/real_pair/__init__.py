"""Methods on a pair of real pretrained models with tokenizers of their own; see README.md."""
