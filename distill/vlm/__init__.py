"""What small vision-language models do around an encoder: cutting images into tiles as InternVL does."""
