"""What a run leaves behind: a journal, an adapter in PEFT's layout, a model card."""
