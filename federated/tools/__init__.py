"""What needs no federation: central training, evaluation, prediction, embeddings, search."""
