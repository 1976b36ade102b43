"""What a person tells a run: the schema of its YAML, named choices, seeds."""

from models.lazy_names import at_first_use

__getattr__ = at_first_use(__name__, {"federated.config.config_files": ("load_config",)})
