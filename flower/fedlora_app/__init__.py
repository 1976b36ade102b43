"""The two apps of fedlora under the names that `flwr run flower` looks for."""
