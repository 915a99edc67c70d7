"""The commands: order and bookkeeping, no algebra."""
