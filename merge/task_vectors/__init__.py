"""Merging of fine-tuned networks by what each has added to their common parent."""
