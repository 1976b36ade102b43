"""Federated fine-tuning on Flower: rounds, payloads, aggregation, reports."""
