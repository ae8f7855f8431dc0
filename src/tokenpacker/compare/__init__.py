"""Every projector under one recipe: the same encoder, language model, data and steps; several seeds; one table.

runs         what is compared: projector x scale factor x seed, and the configs of both stages of each
foundation   the frozen encoder and the language model that all runs begin with
tiles        the test images' vision features, computed once for all runs
one_run      trains one, asks it all test questions, and gives a row
speed        the time to the first token of all of them, side by side
results      the file of rows, which a comparison goes on from
everything   all runs that have no row yet
report       rows -> compare.json, compare.md, compare.png, and the tables in documents
"""
