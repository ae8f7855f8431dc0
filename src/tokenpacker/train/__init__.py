"""Training: the carried model from nothing, by one command (`tiny.train_tiny`).

Read in the order of the work: `recipes` (what is computed), `stages` (the four phases), `encoder` with `dense_labels`
and `local_attention`, `described` (the language model's foundation), `dataset` with `conversations` (what a step
sees), `loop` with `optimizer` (how a phase runs and resumes), `card` (what is written down).
"""
