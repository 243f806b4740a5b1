"""From a run to what others load: Hugging Face directories."""
