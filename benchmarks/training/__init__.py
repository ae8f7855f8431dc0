"""The training benchmark: `python -m benchmarks.training`.

__main__   starts the variants in turn, each in a process of its own, and compares
settings   what is run
data       the samples of mixed lengths
model      the random model and its tokenizer
plain      the plain loop's model and batches
variant    one run of one variant
meter      time and memory of a run
"""
