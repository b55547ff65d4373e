"""Speed and memory of a training step: which rows, which peers, how they are measured and shown.

grid         a row: one method at one size; the benchmark's rows
model        the frozen model that all rows share; its batch and its loss
peers        LoRA by hand-written autograd, HydraLoRA as a loop
contender    a row made real: the shared model with an adapter of its own
measure      the rows in turns, timed; a row that does not fit does not stop the others
results      raw rows on disk; ratios, the table, the targets
roofline     how long it should take: bytes and operations
plots        time and memory against branches, rank and tokens
electricity  kWh of 1000 steps
"""
