"""What the tokens of a Vision Transformer know: identities, probes, studies, and their statistics."""
