"""Engines: what carries messages between the server and the clients."""
