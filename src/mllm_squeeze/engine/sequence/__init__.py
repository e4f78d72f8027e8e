"""What a layer sees of a shortened sequence: masks, rotary tables, positions, and the state of a pass."""
