"""Fused forwards for the engine's steps: found by structure, verified, reversible."""
