"""What a step without a reducer is made of: small typed classes that score, segment, allot, select and merge."""
