"""Where the visual tokens stand: spans of a prompt, and the table that follows them through the cuts."""
