"""Every projector under one recipe: the same encoder, language model, data and steps; several seeds; one table.

runs          the runs of a comparison, and the configs of both stages of each
common_parts  the frozen encoder and the language model that all runs start from
tiles         the test questions and their images' vision features, computed once for all runs
one_run       trains one run, asks it all test questions, and returns a row
latency       the time to the first token of all of them, side by side
results       the file of rows, from which a comparison resumes
variants      a projector's name with settings, as a command line has it
everything    all runs that have no row yet, times and report
intervals     means over seeds with confidence intervals
figure        compare.png
marked_tables tables between marks in documents
report        rows -> compare.json, compare.md, compare.png, and the tables in documents
probe         the minutes' test of projectors alone, without a language model
"""
