"""Few gold answers and many questions: every method on the rows of the quickstart, see README.md."""
