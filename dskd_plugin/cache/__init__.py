"""The teacher's hidden states on disk: computed once, read in every epoch of every run with that teacher."""
