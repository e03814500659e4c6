"""Teacher hidden states kept, so that an image seen again costs no teacher forward."""
