"""Pages to try a model on: one over a server in this process, one of plain files that needs no server."""
