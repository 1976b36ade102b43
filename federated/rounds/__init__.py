"""What happens in a round: the server's part, the client's part, and the run they share."""
