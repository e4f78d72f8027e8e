"""What a layer of the KV cache holds once tokens were cut."""
