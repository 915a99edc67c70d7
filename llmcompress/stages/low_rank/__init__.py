"""Write linears as products of low rank."""
