"""Packages that build on a Trainer, each on that of transformers and on ours."""
