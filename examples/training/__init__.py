"""What the trainings of the demo models share: the command, the loop, the denoiser's steps, tokenizer and export."""
