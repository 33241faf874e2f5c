"""Sources of the teacher's hidden states, and the parts that a teacher is made of."""
