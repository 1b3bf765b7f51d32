"""Text and images on their way into and out of the model. Nothing here imports jax.

- `images`: geometry and pixels of one image, and the places it takes in a prompt; constants in `image_settings`.
- `image_input`: opens an image given by a user, within stated limits.
- `tokenizer`: the checkpoint's own tokenizer, with a safe route for untrusted text.
- `chat_template`: messages (`message`) to a prompt, as text or as token ids.
- `output_parser`: splits output into reasoning, content and tool calls, whole or piece by piece (`tool_call`, `scan`).
- `detokenize`: token ids to text while they are still being generated, and stop strings.
"""
