"""The commands beside ``fedlora run``; ``federated.cli`` registers them."""
