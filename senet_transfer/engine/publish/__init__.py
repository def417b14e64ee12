"""Publication of trained models on the Hugging Face Hub."""
