"""`python -m tokenpacker.demo`: the carried model answers questions about unseen images and writes a report."""
