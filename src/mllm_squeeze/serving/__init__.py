"""Many prompts: batches of lines in a file, and what a server needs to answer requests with budgets of their own."""
