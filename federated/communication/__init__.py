"""What travels and what it costs: codecs, payloads, messages, the ledger of bytes."""
