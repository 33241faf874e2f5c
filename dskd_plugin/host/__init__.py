"""Everything that meets Axolotl: the only files that import it."""
