"""The seam with Transformers: the only part of hf_paged that imports transformers and accelerate."""
