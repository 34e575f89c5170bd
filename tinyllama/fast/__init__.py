"""Speed, and nothing else: without this folder the project is slower and works."""
