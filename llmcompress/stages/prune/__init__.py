"""Remove whole units: neurons, heads, experts, channels of the hidden state, layers."""
