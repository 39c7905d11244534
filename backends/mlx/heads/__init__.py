"""Trained heads on MLX: small networks that read a target's hidden states."""
