"""How the models that travel with the package are made."""
