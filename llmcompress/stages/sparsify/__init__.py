"""Set single weights to zero."""
