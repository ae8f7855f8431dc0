"""Commands that compare projectors: in whole small models, on their own, and by their speed."""
