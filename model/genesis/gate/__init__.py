"""The gate over bytes: policies, their automaton, generation within them, its log, and a classifier beside it."""
