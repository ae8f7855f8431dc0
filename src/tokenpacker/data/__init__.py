"""From a file on disk to the batches that a model learns from.

file -> row -> Record -> Sample -> batch

rows       a row of a file to a `Record`: one conversation and its images, not decoded
records    JSON, JSONL, Parquet and COCO captions: records by number
streams    tar shards and the datasets library: records in order, from a position
labels     a conversation to token ids and labels
samples    a `Record` to a `Sample`: token ids, labels and tiles
index      the length of every sample, from the headers of its images
plan       lengths to batches of sample numbers
collate    samples to the tensors of a batch
batches    the number of a batch to the batch, of files and of streams
rejects    the records that were left out, and why
check      a report on a data set, and a picture of a row
sources    the config of a run to its batches: the door to all of this

annotations    public region annotations to rows
"""
