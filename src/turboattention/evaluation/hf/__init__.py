"""Evaluation of Hugging Face transformers models. Only these modules of the evaluation import transformers."""
