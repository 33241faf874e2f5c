"""Answers sampled from a model: the student's in training, the teacher's for a dataset."""
