"""Images, regions and prompts to model inputs."""
