"""The zoo: a small model of every transformers architecture, and the whole life of an adapter in each."""
