"""What answers prompts: the loaded target itself, or a server that speaks the OpenAI protocol."""
