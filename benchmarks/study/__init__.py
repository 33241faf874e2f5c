"""Methods x seeds on pairs of a real teacher and a small pretrained student; see README.md."""
