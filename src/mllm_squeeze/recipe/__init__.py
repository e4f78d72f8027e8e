"""What the YAML says: template, steps, budgets, rules of validation."""
