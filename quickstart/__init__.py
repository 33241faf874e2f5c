"""The quickstart: distil a real teacher into a student with another tokenizer, on CPU, in minutes."""
