"""Forward passes that teach: data in, AGZO steps, and the loop around them."""
