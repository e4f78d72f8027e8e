"""How a cut is made exact; knows no method and no family by name."""
