"""The cost of an image and its answer: time, memory, tokens and operations, measured or planned from sizes.

model_sizes   the model and the projectors that are measured or planned
flops         operations, counted from the modules without weights
stopwatch     times of named parts, and variants that take turns
memory        memory in use, and an estimate before anything is allocated
machine       hardware, versions and attention kernels
tables        numbers and Markdown tables
speed_plan    `tokenpacker speed --plan`
speed_run     `tokenpacker speed`: the measurement
speed_report  its table, its JSON and its warnings
question      split times of one question, for the demo
"""
