"""Where weights come from: models, safetensors, GGUF and adapter files."""
