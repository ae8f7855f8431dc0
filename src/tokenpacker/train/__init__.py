"""Training of TokenPacker models. Read in this order:

config         a run as a value, and how it is read from files and settings
paper_recipes  the paper's runs as configs
run            from the config to the finished model; what follows are its stations
run_folder     what a folder holds of a run, and whether a config may continue it
assemble       the model and its processor
trainer        steps and checkpoints, with optimizer and callbacks
evaluating     evaluation on the way: a held-out loss, tasks (task_scores), the best checkpoint, an early end
finish         model folder, model card
preview        what a run would do
"""
