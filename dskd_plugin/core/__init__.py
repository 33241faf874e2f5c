"""The method itself: pure functions of tensors, torch and the standard library only."""
