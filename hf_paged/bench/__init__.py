"""Benchmarks that anyone can rerun: `hf-paged bench …`."""
