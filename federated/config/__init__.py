"""What a person tells a run: the schema of its YAML, named choices, seeds."""
