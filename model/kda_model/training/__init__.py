"""Training: synthetic tasks and text, optimisers, a resumable run, and what is measured about it."""
