"""Is it good? Figures with their protocol, and what is compared."""
