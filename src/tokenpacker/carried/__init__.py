"""How the models are made that travel with the package. Read in this order:

recipes      their runs as configs, and the lookup of all recipes
tiny         from the recipes to the models
foundation   encoder and language model, which the paper's stages begin with
encoder, local_attention, described, vocabulary   how the foundation is trained
card         the model card
"""
