"""The losses of the methods, as modules inside the student."""
