"""One machine: central training, evaluation, and the use of trained models."""
