"""Reading and writing: the Hub, safetensors, whole files, tables of rows."""
