"""Answers a file of requests in OpenAI's batch format. A run that was killed goes on where it ended.

    input rows -> pictures -> a local model, an endpoint or Ray's workers -> output rows, in the input's order

Every row's id is a hash of the settings and of its input line. So the output alone says which rows are answered, and
whether it belongs to this input and these settings; nothing else is stored.
"""

from tokenpacker.batch.batch_rows import Answer, Reply, RowError
from tokenpacker.batch.batch_run import BatchSummary, run_batch

__all__ = ["Answer", "BatchSummary", "Reply", "RowError", "run_batch"]
