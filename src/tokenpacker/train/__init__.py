"""Training: a config, a trainer, a run that resumes, and what it leaves behind."""
