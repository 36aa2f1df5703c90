"""What the compiler made of a model: what runs, in which order, and a drawing of it."""
